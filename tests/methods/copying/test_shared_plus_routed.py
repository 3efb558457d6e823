"""DeepSeekMoE's layer from a dense FFN (arXiv 2401.06066), written again in loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.errors import RefusalError, UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder

F = 24
EXACT = 1e-13  # a few hundred fp64 products of order one
QUICK: dict[str, Any] = {"method": "shared_plus_routed", "verification": {"tokens": 128}}


@pytest.mark.parametrize(("shared", "expansion", "granularity"), [(2, 3, 2), (1, 2, 3), (4, 2, 4)])
def test_the_first_shards_are_shared_and_the_others_replicated(
    shared: int, expansion: int, granularity: int, make: Callable
) -> None:
    layer = make("shared_plus_routed", shared=shared, expansion=expansion, granularity=granularity)
    gate, up, down = layer.dense
    width = F // (shared + granularity)
    cut = shared * width
    assert all(map(np.array_equal, layer.shared, (gate[:cut], up[:cut], down[:, :cut])))
    for g in range(expansion):
        for s in range(granularity):
            block = slice(cut + s * width, cut + (s + 1) * width)
            wanted = (gate[block], up[block], down[:, block] * granularity)
            assert all(map(np.array_equal, layer.expert(g * granularity + s), wanted))


@pytest.mark.parametrize("top_k", [2, 4, 6])
@pytest.mark.parametrize("placement", ["down", "up_down"])
def test_exact_when_whole_replicas_run(top_k: int, placement: str, make: Callable, x: np.ndarray) -> None:
    keys = {"expansion": 3, "granularity": 2, "scale_placement": placement}
    assert make("shared_plus_routed", shared=2, top_k=top_k, **keys).error(x) < EXACT


def test_deepseeks_own_gate_needs_all_routed_experts_on(make: Callable, x: np.ndarray) -> None:
    """Card A22: routed down projections times N' and K' = N' at uniform scores."""
    layer = make("shared_plus_routed", shared=2, top_k=4, expansion=1, granularity=4, gate="softmax", groups=False)
    assert layer.blueprint.scale == 4  # N'
    layer.blueprint.router.zero_()
    assert layer.error(x) < EXACT
    assert layer.method.exact_with_any_router is False
    some = make("shared_plus_routed", shared=2, top_k=3, expansion=1, granularity=4, groups=False)
    assert some.error(x) > 0.01
    assert "3 of 4 routed experts" in some.method.inexact(some.shape, some.blueprint.scale)


def test_rows_differ_without_groups(make: Callable) -> None:
    for groups, distinct in ((True, 3), (False, 6)):
        layer = make("shared_plus_routed", shared=2, expansion=3, granularity=2, groups=groups)
        assert len({tuple(row) for row in layer.rows}) == distinct


def test_padding_goes_to_the_routed_shards(make: Callable, x: np.ndarray) -> None:
    layer = make("shared_plus_routed", shared=1, expansion=2, granularity=2, width=22, pad=True)
    assert layer.shape.expert_size == 8
    assert [int((e.neurons >= 0).sum()) for e in layer.blueprint.routed] == [7, 7] * 2
    assert layer.error(x) < EXACT


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    ("name", "keys", "verdict"),
    [
        ("llama", {"shared": 4}, "exact"),
        ("qwen2", {"shared": 2, "parameters": {"expansion": 6, "granularity": 2}, "top_k": 6}, "exact"),
        ("qwen2", {"shared": 4, "parameters": {"groups": False}, "top_k": 8, "router": "zero"}, "exact"),
        ("qwen2", {"shared": 4, "parameters": {"groups": False}, "top_k": 8}, "approximate"),
        ("qwen2", {"shared": 4, "parameters": {"groups": False}, "top_k": 3}, "approximate"),
        ("llama", {"shared": 4, "parameters": {"gate": "softmax"}}, "approximate"),
    ],
)
def test_conversions_verify_as_promised(
    name: str, keys: dict, verdict: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    result = upcycle.convert(str(pico(name)), tmp_path / "out", **QUICK, **keys)
    checked = result.verification
    assert checked is not None
    assert (checked.verdict, result.plan.promise, result.plan.target) == (verdict, verdict, "qwen2_moe")
    if verdict == "approximate":
        assert checked.relative_logit_error > 1e-4
        assert checked.all_experts_error is not None
        assert checked.all_experts_error < 1e-6  # fp32: all experts at equal weight are the dense FFN
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    total = sum(spec.elements for spec in SafetensorsFolder(tmp_path / "out").specs.values())
    assert result.plan.parameters_total == total
    again = tmp_path / "again"
    upcycle.convert(str(pico(name)), again, blueprint=tmp_path / "out" / "blueprint.safetensors", **QUICK)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "needs shared experts"),
        ({"shared": 4, "experts": 6}, "= 8 experts, not 6"),
        ({"shared": 4, "top_k": 3}, "top-k 3 is not a multiple of granularity 4"),
        ({"shared": 3}, "do not divide into 3 shared \\+ granularity 4 = 7 equal shards"),
        ({"shared": 96, "pad": True}, "leave 0 of 96 neurons"),
    ],
)
def test_bad_input(keys: dict, message: str, pico: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=message):
        upcycle.plan(str(pico("llama")), method="shared_plus_routed", **keys)


def test_a_target_without_shared_experts_is_refused(pico: Callable[[str], Path]) -> None:
    for unheld in ("refuse", "route"):
        with pytest.raises(RefusalError, match="cannot hold shared experts"):
            upcycle.plan(
                str(pico("qwen3")), method="shared_plus_routed", shared=4, shared_unheld=unheld, target="qwen3_moe"
            )
