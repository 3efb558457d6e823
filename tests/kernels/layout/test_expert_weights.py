"""Layouts of expert weights: the same numbers in each, and what does not fit together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expert_cases import WIDTHS, make_weights

from upcycle.errors import UsageError
from upcycle.kernels.layout.dispatch import route
from upcycle.kernels.layout.expert_weights import ExpertWeights, intermediate_offsets, pack, unpack


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packing_loses_nothing(gated: bool, bias: bool, dtype: torch.dtype) -> None:
    stacked = make_weights("stacked", gated, bias, dtype=dtype)
    other = unpack(stacked, interleaved=True, transposed=True)
    for start in (stacked, other):
        for back in (unpack(pack(start)), unpack(start), unpack(unpack(pack(start), True, True))):
            for name in ("up", "down", "up_bias", "down_bias"):
                found, expected = getattr(back, name), getattr(stacked, name)
                assert (found is None and expected is None) or torch.equal(found, expected), name
            assert (back.interleaved, back.transposed, back.widths) == (False, False, None)
    packed = pack(other)
    assert torch.equal(packed.up, pack(stacked).up)
    assert pack(packed) is packed


def test_the_packed_layout_spelled_out() -> None:
    stacked = make_weights("stacked", bias=True, experts=3, hidden=12, width=8)
    packed = pack(stacked)
    assert packed.widths == (8, 8, 8)
    assert stacked.up_bias is not None
    assert packed.up_bias is not None
    for expert in range(3):
        for neuron in range(8):
            row = 8 * expert + neuron
            assert torch.equal(packed.up[2 * row], stacked.up[expert, neuron])
            assert torch.equal(packed.up[2 * row + 1], stacked.up[expert, 8 + neuron])
            assert torch.equal(packed.down[row], stacked.down[expert, :, neuron])
            assert packed.up_bias[2 * row] == stacked.up_bias[expert, neuron]


@pytest.mark.parametrize("layout", ["stacked", "transposed", "packed"])
def test_views_of_one_expert_are_the_same_in_every_layout(layout: str) -> None:
    weights, stacked = make_weights(layout, bias=True), make_weights("stacked", bias=True)
    for expert in range(5):
        gate, up = stacked.up[expert].chunk(2)
        assert torch.equal(weights.up_of(expert, "gate"), gate)
        assert torch.equal(weights.up_of(expert, "up"), up)
        assert torch.equal(weights.down_of(expert), stacked.down[expert])
        bias = weights.half(weights.up_bias_of(expert), "up")
        assert torch.equal(bias, stacked.up_bias_of(expert)[8:])
        weights.pick(weights.up, expert, "gate").zero_()
        assert not weights.up_of(expert, "gate").any(), "a view"


def test_ragged() -> None:
    weights = make_weights("ragged", hidden=12)
    assert weights.starts == (0, 8, 32, 48, 56, 64)
    assert weights.width_offsets().tolist() == list(weights.starts)
    assert (weights.hidden, weights.num_experts, weights.packed) == (12, 5, True)
    assert weights.up_of(1).shape == (48, 12)
    assert weights.down_of(1).shape == (12, 24)
    with pytest.raises(UsageError, match=r"widths \[8, 16, 24\] cannot be stacked") as caught:
        unpack(weights)
    assert "pad them" in str(caught.value.hint)


def test_intermediate_offsets() -> None:
    dispatch = route(torch.tensor([[0, 1], [1, 4], [1, 2], [5, 2]]), 5)
    rows = (1, 3, 2, 0, 1)
    sizes = [number * width for number, width in zip(rows, WIDTHS, strict=True)]
    expected = [sum(sizes[:expert]) for expert in range(6)]
    weights = make_weights("ragged")
    assert intermediate_offsets(dispatch, weights).tolist() == expected
    assert intermediate_offsets(dispatch, weights, 2).tolist() == [2 * offset for offset in expected]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "tanh"}, "the activation 'tanh' have no kernel"),
        ({"up": torch.zeros(5, 16, 12, dtype=torch.int8)}, "experts are torch.int8"),
        ({"up": torch.zeros(16, 12)}, "stacked experts have three dimensions"),
        ({"up": torch.zeros(0, 16, 12)}, "there are no experts"),
        ({"up": torch.zeros(5, 15, 12)}, "15 rows per expert; with a gate"),
        ({"down": torch.zeros(5, 12, 9)}, r"down has the shape \(5, 12, 9\), not \(5, 12, 8\)"),
        ({"down": torch.zeros(5, 12, 8, dtype=torch.bfloat16)}, r"down is torch.bfloat16 on cpu, up torch.float32"),
        ({"down": torch.zeros(5, 12, 8, device="meta")}, r"down is torch.float32 on meta"),
        ({"up_bias": torch.zeros(5, 8)}, r"up_bias has the shape \(5, 8\), not \(5, 16\)"),
        ({"down_bias": torch.zeros(5, 8)}, r"down_bias has the shape"),
    ],
)
def test_what_does_not_fit(changes: dict, message: str) -> None:
    good = make_weights("stacked", dtype=torch.float32)
    with pytest.raises(UsageError, match=message):
        replace(good, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": ()}, "there must be experts"),
        ({"widths": (8, 0)}, "each at least 1 wide"),
        ({"widths": (8, 8)}, r"up has the shape \(80, 12\), not \(32, 12\)"),
        ({"interleaved": False}, "alternating gate and up rows"),
        ({"up": torch.zeros(5, 16, 12)}, "packed experts have two dimensions"),
    ],
)
def test_what_is_not_packed(changes: dict, message: str) -> None:
    good = make_weights("packed", dtype=torch.float32)
    with pytest.raises(UsageError, match=message):
        replace(good, **changes)


def test_a_layout_without_a_gate() -> None:
    weights = ExpertWeights(torch.zeros(2, 8, 12), torch.zeros(2, 12, 8), "relu2", gated=False)
    assert weights.rows_per_neuron == 1
    assert weights.up_of(0, "gate").shape == weights.up_of(0, "up").shape == (8, 12)
