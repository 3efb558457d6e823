"""Whole passes in the processor's tiles: against the reference in fp64, in every layout, and what must never be read."""

from __future__ import annotations

import pytest
import torch
from expert_cases import apart, make_weights, random_ids, rounding

from upcycle.kernels.cpu import backend
from upcycle.kernels.cpu.fused_activations import FUSED_CODES
from upcycle.kernels.cpu.native.tile_products import LARGEST_TILED
from upcycle.kernels.cpu.tiled_pass import tile_pass, tiled_pass
from upcycle.kernels.layout import reference
from upcycle.kernels.layout.dispatch import route
from upcycle.kernels.layout.expert_weights import ExpertWeights

pytestmark = pytest.mark.skipif(tile_pass() is None, reason="this CPU has no tiles, or there is no compiler")
SIZES = [(1, 1), (16, 32), (40, 24), (33, 70), (200, 96)]  # H, I: whole tiles and parts of them
TOKENS = (1, 17, 70, 600)  # an expert of the last has several chunks of rows


def in_double(weights: ExpertWeights) -> ExpertWeights:
    return weights.around(*(None if tensor is None else tensor.double() for tensor in weights.tensors))


def check(weights: ExpertWeights, ids: torch.Tensor, weighted: bool, offsets: torch.Tensor | None = None) -> None:
    """Output and z against fp64, and the same bits whether z is kept or not, and on any number of threads."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(
        len(ids) if offsets is None else len(offsets) - 1, weights.hidden, generator=draw, dtype=torch.float64
    )
    x = x.bfloat16()
    scores = torch.rand(ids.numel(), generator=draw) if weighted else None
    dispatch = route(ids, weights.num_experts, offsets)
    found = tiled_pass(x, weights, dispatch, scores, True)
    assert found is not None
    exact, shaped = in_double(weights), None if scores is None else scores.double().view(ids.shape)
    expected = reference.experts_output(x.double(), exact, ids, shaped, offsets)
    # The activations are rounded to bf16 between both products, which each of them may carry on.
    bound = 2 * rounding(torch.bfloat16, weights.hidden + max(weights.all_widths))
    assert found[0].dtype == torch.bfloat16
    assert apart(found[0], expected) < bound
    assert len(found[1]) == int(dispatch.offsets.diff() @ torch.tensor(weights.all_widths)) * weights.rows_per_neuron
    _, z = slow(x, weights, ids, scores, offsets)
    assert apart(found[1], z) < bound
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            again = tiled_pass(x, weights, dispatch, scores, count == 2)
        finally:
            torch.set_num_threads(threads)
        assert again is not None
        assert torch.equal(again[0], found[0]), count
        assert len(again[1]) == (len(found[1]) if count == 2 else 0)


def slow(
    x: torch.Tensor,
    weights: ExpertWeights,
    ids: torch.Tensor,
    scores: torch.Tensor | None,
    offsets: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by way of fp64."""
    exact = in_double(weights)
    shaped = None if scores is None else scores.double()
    return backend.forward(x.double(), exact, route(ids, weights.num_experts, offsets), shaped, True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("hidden", "width"), SIZES)
@pytest.mark.parametrize("gated", [True, False])
def test_every_size(hidden: int, width: int, gated: bool) -> None:
    weights = make_weights(gated=gated, dtype=torch.bfloat16, hidden=hidden, width=width)
    for tokens in TOKENS:
        check(weights, random_ids(tokens, 3, 5), weighted=tokens != 17)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["stacked", "packed", "ragged"])
@pytest.mark.parametrize("activation", FUSED_CODES)
def test_every_layout_and_activation(layout: str, activation: str) -> None:
    for gated in (True, False):
        weights = make_weights(layout, gated, activation=activation, dtype=torch.bfloat16, hidden=40, width=24)
        check(weights, random_ids(50, 2, 5), weighted=True)


def test_columns_that_are_contiguous() -> None:
    """Weights that are stored transposed, gate beside up."""
    like = make_weights(dtype=torch.bfloat16, hidden=72, width=33)
    up, down = like.up.transpose(1, 2).contiguous(), like.down.transpose(1, 2).contiguous()
    check(ExpertWeights(up, down, "silu", True, False, True), random_ids(80, 2, 5), weighted=True)


@pytest.mark.usefixtures("poisoned")
def test_numbers_of_experts_that_differ_and_slots_that_are_dropped() -> None:
    weights = make_weights(dtype=torch.bfloat16, hidden=40, width=24)
    ids = random_ids(17, 3, 5)
    ids[ids == 3] = 5  # expert 3 is idle
    ids[4] = 5  # a token without an expert
    for tensor in (weights.up_of(3), weights.down_of(3)):
        tensor.fill_(torch.nan)
    x = torch.randn(17, 40).bfloat16()
    x[4] = torch.nan
    found = tiled_pass(x, weights, route(ids, 5), torch.rand(51), False)
    assert found is not None
    assert found[0].isfinite().all()
    assert not found[0][4].any()
    none = tiled_pass(x, weights, route(torch.full((17, 3), 5), 5), None, True)
    assert none is not None
    assert not none[0].any()
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), (torch.arange(17) % 4).cumsum(0)])
    weights = make_weights(dtype=torch.bfloat16, hidden=40, width=24)
    check(weights, random_ids(17, 3, 5).flatten()[: int(bounds[-1])], weighted=True, offsets=bounds)


def test_a_token_does_not_depend_on_those_beside_it() -> None:
    weights = make_weights(dtype=torch.bfloat16, hidden=40, width=24)
    x, ids, scores = torch.randn(100, 40).bfloat16(), random_ids(100, 2, 5), torch.rand(100, 2)
    whole = tiled_pass(x, weights, route(ids, 5), scores.flatten(), False)
    part = tiled_pass(x[30:61], weights, route(ids[30:61], 5), scores[30:61].flatten(), False)
    assert whole is not None
    assert part is not None
    assert torch.equal(whole[0][30:61], part[0])


def test_what_there_is_no_kernel_for() -> None:
    weights = make_weights(dtype=torch.bfloat16, hidden=40, width=24)
    x, dispatch = torch.randn(17, 40).bfloat16(), route(random_ids(17, 2, 5), 5)
    assert tiled_pass(x, weights, dispatch, None, False) is not None
    others = [
        make_weights(bias=True, dtype=torch.bfloat16, hidden=40, width=24),
        make_weights("transposed", dtype=torch.bfloat16, hidden=40, width=24),  # gate and up columns alternate
        make_weights(activation="gelu", dtype=torch.bfloat16, hidden=40, width=24),
        make_weights(dtype=torch.bfloat16, hidden=40, width=LARGEST_TILED // 80 + 1),
    ]
    assert all(tiled_pass(x, other, dispatch, None, False) is None for other in others)
    full = make_weights(dtype=torch.float32, hidden=40, width=24)
    assert tiled_pass(x.float(), full, dispatch, None, False) is None
    apart_ = torch.randn(17, 80).bfloat16()[:, ::2]
    assert tiled_pass(apart_, weights, dispatch, None, False) is None
