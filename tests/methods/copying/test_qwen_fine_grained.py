"""Qwen2-57B-A14B's initialisation against the report's recipe, written again in loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.errors import RefusalError, UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder

F = 24
QUICK: dict[str, Any] = {"method": "qwen_fine_grained", "verification": {"tokens": 128}}


@pytest.mark.parametrize(("experts", "shared", "size"), [(8, 0, 6), (6, 4, 9), (3, 1, 24), (5, 0, 7)])
def test_experts_are_consecutive_pieces_of_shuffled_copies(
    experts: int, shared: int, size: int, make: Callable
) -> None:
    layer = make("qwen_fine_grained", experts=experts, shared=shared, expert_size=size)
    specs = layer.blueprint.shared + layer.blueprint.routed
    pool = [int(j) for spec in specs for j in spec.neurons]
    copies = math.ceil((experts + shared) * size / F)
    assert len(pool) == (experts + shared) * size <= copies * F
    for c in range(copies):
        piece = pool[c * F : (c + 1) * F]
        assert len(set(piece)) == len(piece)  # of one permutation, the last one cut off
        assert piece != sorted(piece)
    orders = {tuple(pool[c * F : (c + 1) * F]) for c in range(copies)}
    assert len(orders) == copies


def test_gate_up_and_down_are_permuted_alike_and_half_of_the_neurons_are_new(make: Callable) -> None:
    layer = make("qwen_fine_grained", experts=16, shared=4, segments=4)
    gate, up, down = layer.dense
    wide = layer.shared
    new = []
    for i, spec in enumerate(layer.blueprint.shared + layer.blueprint.routed):
        block = slice(i * 6, (i + 1) * 6)
        mine = (wide[0][block], wide[1][block], wide[2][:, block]) if i < 4 else layer.expert(i - 4)
        drawn = [bool(flag) for flag in spec.fresh[0]]
        assert sum(drawn) == 3
        for slot, j in enumerate(spec.neurons.tolist()):
            found = (mine[0][slot], mine[1][slot], mine[2][:, slot])
            if drawn[slot]:
                new += [value for vector in found for value in vector]
            else:
                assert all(map(np.array_equal, found, (gate[j], up[j], down[:, j])))
    # 20 experts x 3 neurons x 24 weights, normal with deviation 0.02: four standard errors.
    values = np.array(new)
    assert len(values) == 20 * 3 * 24
    assert values.std() == pytest.approx(0.02, rel=4 / np.sqrt(2 * len(values)))
    assert abs(values.mean()) < 4 * 0.02 / np.sqrt(len(values))


def test_whole_copies_with_nothing_new_add_up_to_the_dense_ffn(make: Callable, x: np.ndarray) -> None:
    layer = make("qwen_fine_grained", experts=8, top_k=8, segments=4, reset=0.0, scale=4.0)
    layer.blueprint.router.zero_()
    assert layer.error(x) < 1e-13  # fp64, a few hundred products of order one
    assert layer.method.scale("exact", 8, 8) == 4.0
    assert layer.method.scale("paper", 8, 2) == 1.0


@pytest.mark.long
def test_qwen15_layout_end_to_end(pico: Callable[[str], Path], tmp_path: Path) -> None:
    keys = {"experts": 12, "top_k": 4, "shared": 4, "parameters": {"segments": 4, "gate": "softmax"}}
    result = upcycle.convert(str(pico("qwen2")), tmp_path / "out", **QUICK, **keys)
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert result.verification.explanation == "experts are random pieces of shuffled copies, 50% of each re-initialised"
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert (model.config.num_experts, model.config.shared_expert_intermediate_size) == (12, 96)
    assert (model.config.moe_intermediate_size, model.config.norm_topk_prob) == (24, False)
    total = sum(spec.elements for spec in SafetensorsFolder(tmp_path / "out").specs.values())
    assert result.plan.parameters_total == total
    assert result.plan.parameters_active == total - 3 * 8 * 3 * 24 * 32
    upcycle.convert(str(pico("qwen2")), tmp_path / "two", blueprint=tmp_path / "out" / "blueprint.safetensors", **QUICK)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "two"))
    assert one == two


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("std", "expected"), [(None, 0.02), (0.1, 0.1)])
def test_new_weights_have_the_models_deviation_or_the_given_one(
    std: float | None, expected: float, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    parameters = {"reset": 1.0, **({} if std is None else {"std": std})}
    upcycle.convert(str(pico("llama")), tmp_path / "out", parameters=parameters, **QUICK)
    gates = [
        SafetensorsFolder(tmp_path / "out").read(f"model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight")
        for i in range(3)
        for e in range(8)
    ]
    values = torch.stack(gates)
    # The pico model's initializer_range is transformers' default; four standard errors.
    assert values.std().item() == pytest.approx(expected, rel=4 / (2 * values.numel()) ** 0.5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parameters": {"segments": 7}}, "96 neurons do not divide into 7 segments"),
        ({"parameters": {"segments": 97}}, "segments = 97: the FFN has 96 neurons"),
        ({"parameters": {"expert_size": 97}}, "expert_size = 97: the FFN has 96 neurons"),
        ({"parameters": {"expert_size": 24, "segments": 4}}, "the same thing twice"),
        ({"parameters": {"expert_size": 24}, "scale": "exact"}, "expert_size is given instead"),
        ({"parameters": {"reset": 1.1}}, "key 'reset': .* got 1.1"),
        ({"parameters": {"std": 0}}, "key 'std'"),
        ({"scale": "sum"}, "averaged, not summed"),
    ],
)
def test_bad_input(keys: dict, message: str, pico: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=message):
        upcycle.plan(str(pico("llama")), method="qwen_fine_grained", **keys)


def test_widths_that_do_not_divide_are_rounded_up_where_padding_is_allowed(pico: Callable[[str], Path]) -> None:
    keys = {"method": "qwen_fine_grained", "parameters": {"segments": 7}, "pad": True}
    plan = upcycle.plan(str(pico("llama")), **keys)
    # 8 experts of 16 neurons for 96: half as many FFN weights again.
    assert plan.parameters_total - plan.parameters_dense == 3 * (3 * 32 * (8 * 16 - 96) + 8 * 32)


def test_a_target_without_shared_experts_is_refused(pico: Callable[[str], Path]) -> None:
    for unheld in ("refuse", "route"):
        with pytest.raises(RefusalError, match="cannot hold shared experts"):
            upcycle.plan(
                str(pico("qwen3")), method="qwen_fine_grained", shared=4, shared_unheld=unheld, target="qwen3_moe"
            )
