"""Virtual groups against arXiv 2410.07524's construction, written again in loops."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ffn_forms import arrays, ffn_of, output
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.errors import RefusalError, UsageError
from upcycle.ffn.expert_tensors import ExpertTensors
from upcycle.ffn.form import FfnForm
from upcycle.ffn.moe_shape import MoeShape, Part
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.registry import load

D, F = 8, 24
# A few hundred fp64 products of order one, summed: far below this, and any fault of the formula is far above.
EXACT = 1e-13
QUICK: dict[str, Any] = {"method": "virtual_groups", "verification": {"tokens": 128}}


@pytest.mark.parametrize("placement", ["down", "up_down", "paper"])
@pytest.mark.parametrize(
    ("expansion", "granularity", "top_k", "gate", "expected"),
    [
        (2, 4, 4, "normalized", 4),  # A = G
        (3, 2, 4, "normalized", 2),
        (2, 4, 4, "softmax", 8),  # A = E G^2 / T
        (8, 8, 8, "softmax", 64),  # the paper's E8G8T8: 4 on each of three matrices
        (8, 1, 2, "softmax", 4),  # E8G1T2
    ],
)
def test_experts_are_scaled_shards_of_replicas(
    expansion: int, granularity: int, top_k: int, gate: str, expected: float, placement: str, make: Callable
) -> None:
    keys = {"expansion": expansion, "granularity": granularity, "gate": gate, "scale_placement": placement}
    layer = make("virtual_groups", top_k=top_k, **keys)
    assert layer.blueprint.scale == expected
    powers = {"down": (0, 0, 1), "up_down": (0, 1 / 2, 1 / 2), "paper": (1 / 3, 1 / 3, 1 / 3)}[placement]
    width = F // granularity
    for g in range(expansion):
        for s in range(granularity):
            block = slice(s * width, (s + 1) * width)
            dense_gate, dense_up, dense_down = layer.dense
            wanted = (dense_gate[block], dense_up[block], dense_down[:, block])
            for matrix, dense, power in zip(layer.expert(g * granularity + s), wanted, powers, strict=True):
                assert np.array_equal(matrix, dense * expected**power)


def test_rows_are_bit_equal_inside_a_replica_and_random_across(make: Callable) -> None:
    layer = make("virtual_groups", expansion=3, granularity=4)
    rows = torch.from_numpy(layer.rows).bfloat16().view(3, 4, -1)
    assert (rows == rows[:, :1]).all()
    assert len(rows[:, 0].unique(dim=0)) == 3


@pytest.mark.parametrize("placement", ["down", "up_down"])
@pytest.mark.parametrize("top_k", [4, 8, 12])
def test_exact_when_whole_replicas_run(placement: str, top_k: int, make: Callable, x: np.ndarray) -> None:
    layer = make("virtual_groups", top_k=top_k, expansion=3, granularity=4, scale_placement=placement)
    assert layer.error(x) < EXACT
    # Whole replicas: every chosen expert's shards are all there.
    for token in x:
        chosen = sorted(e // 4 for e in layer.weights(token))
        assert all(chosen.count(g) == 4 for g in chosen)


def test_softmax_first_is_exact_when_all_run_and_near_where_weights_are_nearly_equal(
    make: Callable, x: np.ndarray
) -> None:
    keys = {"expansion": 2, "granularity": 4, "gate": "softmax"}
    assert make("virtual_groups", top_k=8, **keys).error(x) < EXACT
    layer = make("virtual_groups", top_k=4, **keys)
    # The chosen replica weighs w instead of 1/2, so the output is 2 w times the dense one, token by token.
    factors = [2 * sum(layer.weights(token).values()) for token in x]
    dense = [make("virtual_groups", top_k=8, **keys).output(token) for token in x]
    for token, factor, expected in zip(x, factors, dense, strict=True):
        assert np.allclose(layer.output(token), factor * expected, rtol=1e-12, atol=1e-13)
    assert 0.01 < layer.error(x) < 1


def test_the_papers_placement_is_not_exact_for_silu(make: Callable, x: np.ndarray) -> None:
    keys = {"expansion": 2, "granularity": 4, "scale_placement": "paper"}
    layer = make("virtual_groups", **keys)
    assert layer.error(x) > 0.05
    assert not layer.method.exact_when_all_active
    assert "4^(1/3)" in (layer.method.inexact(layer.shape, 4.0) or "")
    whole = make("virtual_groups", expansion=2, granularity=1, scale_placement="paper")
    assert whole.error(x) < EXACT
    assert whole.method.inexact(whole.shape, 1.0) is None


def test_a_width_that_does_not_divide_is_padded_evenly(make: Callable, x: np.ndarray) -> None:
    layer = make("virtual_groups", width=22, pad=True, expansion=2, granularity=4)
    assert layer.shape.expert_size == 8
    assert [int((e.neurons >= 0).sum()) for e in layer.blueprint.routed] == [6, 5, 6, 5] * 2
    assert layer.error(x) < EXACT


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    ("name", "keys", "target"),
    [
        ("llama", {}, "mixtral"),
        ("llama", {"top_k": 8, "layout": "fused"}, "mixtral"),
        ("llama", {"parameters": {"scale_placement": "up_down"}}, "mixtral"),
        ("qwen2", {"parameters": {"expansion": 4, "granularity": 3}, "top_k": 6}, "qwen2_moe"),
        ("qwen3", {"parameters": {"granularity": 6}, "dtype": "float32", "router": "cool"}, "qwen3_moe"),
        ("mistral", {"parameters": {"granularity": 5}, "pad": True}, "mixtral"),
    ],
)
def test_conversions_verify_exact_and_load_in_stock_transformers(
    name: str, keys: dict, target: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    result = upcycle.convert(str(pico(name)), tmp_path / "out", **QUICK, **keys)
    assert result.verification is not None
    assert (result.verification.verdict, result.plan.promise, result.plan.target) == ("exact", "exact", target)
    ids = torch.randint(4096, (2, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        dense, moe = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (pico(name), tmp_path / "out"))
    # fp32, three layers: a few roundings of 6e-8 each; a replica split on one token gives errors of order 0.1.
    assert torch.linalg.norm(moe - dense) < 2e-6 * torch.linalg.norm(dense)


@pytest.mark.long
def test_rounding_is_promised_where_a_root_is_no_power_of_two(pico: Callable[[str], Path], tmp_path: Path) -> None:
    keys = {"parameters": {"granularity": 2, "scale_placement": "up_down"}, "dtype": "bfloat16"}
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", **QUICK, **keys)
    assert result.plan.promise == "rounded"
    assert "the factor 1.41421 rounds in bfloat16" in result.plan.promise_reason
    assert result.verification is not None
    assert result.verification.verdict == "approximate"


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("keys", "reason", "everyone"),
    [
        ({"parameters": {"scale_placement": "paper"}}, "scale_placement=paper", False),
        ({"parameters": {"partial": True}, "top_k": 6}, "not a multiple of granularity", True),
        ({"parameters": {"gate": "softmax"}}, "gate=softmax", True),
        ({"scale": 2.0}, "scaled by 2, equality needs 4", True),
    ],
)
def test_what_is_not_exact_says_why_and_is_measured(
    keys: dict, reason: str, everyone: bool, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", **QUICK, **keys)
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert reason in result.verification.explanation
    assert result.verification.relative_logit_error > 1e-3
    # All experts at equal weight are still the dense FFN, to fp32's roundings, wherever the placement is exact.
    assert (result.verification.all_experts_error is not None) == everyone
    assert result.verification.all_experts_error is None or result.verification.all_experts_error < 1e-6


@pytest.mark.long
def test_the_plan_counts_the_model_that_is_written(pico: Callable[[str], Path], tmp_path: Path) -> None:
    keys = {"parameters": {"expansion": 4, "granularity": 4}, "top_k": 8}
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", **QUICK, **keys)
    specs = SafetensorsFolder(tmp_path / "out").specs
    assert result.plan.parameters_total == sum(spec.elements for spec in specs.values())
    dense = sum(spec.elements for spec in SafetensorsFolder(pico("llama")).specs.values())
    ffn, router = 3 * 3 * 32 * 96, 3 * 16 * 32
    assert result.plan.parameters_total == dense + 3 * ffn + router
    assert result.plan.parameters_active == dense + ffn + router  # two of four replicas
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 16
    assert any("2x the neurons of the FFN" in warning for warning in result.plan.warnings)


@pytest.mark.long
def test_a_saved_blueprint_rebuilds_the_same_bytes(pico: Callable[[str], Path], tmp_path: Path) -> None:
    keys = {"parameters": {"scale_placement": "up_down"}}
    upcycle.convert(str(pico("llama")), tmp_path / "one", **QUICK, **keys)
    upcycle.convert(str(pico("llama")), tmp_path / "two", blueprint=tmp_path / "one" / "blueprint.safetensors", **QUICK)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({"experts": 6}, "expansion 2 * granularity 4 = 8 experts, not 6", "leave --experts out"),
        ({"top_k": 6}, "top-k 6 is not a multiple of granularity 4", "--top-k 8"),
        ({"top_k": 1}, "top-k 1 is not a multiple of granularity 4", "--top-k 4"),
        ({"top_k": 12}, "top_k is 12, but there are only 8 experts", ""),
        ({"parameters": {"granularity": 7}}, "96 neurons do not divide into granularity = 7 equal shards", "--pad"),
        ({"parameters": {"granularity": 0}}, "key 'granularity'", ""),
        ({"parameters": {"scale_placement": "gate"}}, "key 'scale_placement'", ""),
        ({"shared": 2}, "no shared experts", "shared_plus_routed"),
        ({"scale": "sum"}, "averaged, not summed", "--scale exact"),
        ({"active": 0.5}, "active says how much of a split runs", ""),
    ],
)
def test_bad_input(keys: dict, message: str, hint: str, pico: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError) as caught:
        upcycle.plan(str(pico("llama")), method="virtual_groups", **keys)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "router", ["centroid", "ridge", {"name": "zero", "parameters": {"inference_only": True}}], ids=str
)
def test_a_router_that_cannot_tell_replicas_apart_is_refused(
    router: Any, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    calibration = {"calibration": {"text": "demo", "tokens": 512, "window": 64}} if router == "ridge" else {}
    with pytest.raises(UsageError, match="another router row for every replica"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", router=router, **QUICK, **calibration)


def test_a_target_that_always_renormalises_is_refused(pico: Callable[[str], Path]) -> None:
    keys = {"method": "virtual_groups", "parameters": {"gate": "softmax"}}
    assert upcycle.plan(str(pico("llama")), **keys).target == "qwen2_moe"
    with pytest.raises(RefusalError, match="mixtral always makes the chosen experts' weights sum to 1") as caught:
        upcycle.plan(str(pico("llama")), target="mixtral", **keys)
    assert caught.value.hint == "use --target qwen2_moe"


def shape(form: FfnForm, method: str, top_k: int = 4, **parameters: Any) -> tuple[Any, MoeShape]:
    cls = load("method", method)
    made = cls(cls.Parameters(**parameters))
    return made, MoeShape(8, top_k, 0, F // 4, (3,), made.normalized, form)


@pytest.mark.parametrize("method", ["virtual_groups", "shared_plus_routed"])
@pytest.mark.parametrize(
    ("activation", "placement", "taken"),
    [
        ("gelu", "down", True),
        ("gelu", "up_down", False),
        ("gelu", "paper", False),
        ("relu", "up_down", True),
        ("relu", "paper", False),
        ("relu2", "up_down", False),
        ("relu2", "paper", True),  # the paper's own models
    ],
)
def test_without_a_gate_the_scale_goes_where_it_comes_out_again(
    activation: str, placement: str, taken: bool, method: str
) -> None:
    made, wanted = shape(FfnForm(activation, gated=False), method, scale_placement=placement)
    if not taken:
        with pytest.raises(UsageError, match=f"scale_placement={placement} .* activation {activation}") as caught:
            made.check(wanted)
        assert caught.value.hint == "--param scale_placement=down"
        return
    made.check(wanted)
    assert made.inexact(wanted, 4.0) is None
    ffn = ffn_of(wanted.form, F, D)
    if method == "shared_plus_routed":
        wanted = replace(wanted, shared=2, expert_size=F // 6)
    tensors = ExpertTensors(ffn, made.blueprint(ffn, wanted, 4.0, torch.Generator()))
    own, x = arrays(ffn), np.random.default_rng(1).standard_normal((5, D))
    replica = [{name: tensors.part(Part(name, s)).numpy() for name in ("up", "down")} for s in range(4)]
    beside = (
        [] if method == "virtual_groups" else [{n: tensors.part(Part(f"shared_{n}")).numpy() for n in ("up", "down")}]
    )
    found = sum(output(shard, activation, x) for shard in replica) / 4 + sum(output(s, activation, x) for s in beside)
    assert np.linalg.norm(found - output(own, activation, x)) < EXACT * np.linalg.norm(output(own, activation, x))


@pytest.mark.parametrize("method", ["virtual_groups", "shared_plus_routed"])
def test_a_down_bias_that_the_scale_cannot_make_up_for_is_refused(method: str) -> None:
    form = FfnForm("gelu", False, frozenset({"down"}))
    made, wanted = shape(form, method, gate="softmax")
    with pytest.raises(
        UsageError, match=f"gate=softmax leaves about 0.5 of this model's down bias: {method}"
    ) as caught:
        made.check(wanted)
    assert caught.value.hint == "--param gate=normalized"
    made.check(replace(wanted, top_k=8))
    made.check(replace(wanted, form=replace(form, biases=frozenset({"up"}))))
    shape(form, method)[0].check(wanted)
