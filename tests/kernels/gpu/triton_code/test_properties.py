"""What must hold for any routing: order of tokens and of experts changes nothing, not one bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Case, make

from upcycle.kernels.gpu.backend import forward
from upcycle.kernels.gpu.tile_table import TileTable
from upcycle.kernels.layout.dispatch import route
from upcycle.kernels.layout.expert_weights import ExpertWeights

EXPERTS, TOKENS = 4, 7
few = settings(
    max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Ids up to EXPERTS: dropped slots are among them.
ids = st.lists(st.lists(st.integers(0, EXPERTS), min_size=2, max_size=2, unique=True), min_size=TOKENS, max_size=TOKENS)


def layer(device: torch.device) -> tuple[torch.Tensor, ExpertWeights, torch.Tensor]:
    made = make(Case(tokens=TOKENS, widths=(16,) * EXPERTS, dtype=torch.bfloat16), device)
    x, weights, _, scores = made.arguments
    return x, weights, scores.view(TOKENS, 2)


@pytest.mark.slow
@few
@given(ids=ids, order=st.permutations(range(TOKENS)))
def test_permuted_tokens(ids: list[list[int]], order: list[int], device: torch.device, table: TileTable) -> None:
    x, weights, scores = layer(device)
    chosen = torch.tensor(ids, device=device)

    def run(rows: list[int]) -> torch.Tensor:
        dispatch = route(chosen[rows], EXPERTS)
        return forward(x[rows], weights, dispatch, scores[rows].flatten(), False, table)[0]

    assert torch.equal(run(order), run(list(range(TOKENS)))[order])


@pytest.mark.slow
@few
@given(ids=ids, order=st.permutations(range(EXPERTS)))
def test_permuted_experts(ids: list[list[int]], order: list[int], device: torch.device, table: TileTable) -> None:
    x, weights, scores = layer(device)
    up, down = weights.up.view(EXPERTS, -1, 32), weights.down.view(EXPERTS, -1, 32)
    moved = ExpertWeights(up[order].flatten(0, 1), down[order].flatten(0, 1), interleaved=True, widths=weights.widths)
    places = torch.tensor([*(order.index(expert) for expert in range(EXPERTS)), EXPERTS], device=device)
    chosen = torch.tensor(ids, device=device)
    first = forward(x, weights, route(chosen, EXPERTS), scores.flatten(), False, table)[0]
    second = forward(x, moved, route(places[chosen], EXPERTS), scores.flatten(), False, table)[0]
    assert torch.equal(first, second)
