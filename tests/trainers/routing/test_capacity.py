"""Who finds room at an expert, against the published orders written with loops. T tokens, E experts, K top-k."""

from __future__ import annotations

import math

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.trainers.routing.capacity import within_capacity
from upcycle.trainers.routing.routing_rule import RoutingRule

G, S, E, K = 2, 10, 4, 2


def naive(
    weights: torch.Tensor,
    experts: torch.Tensor,
    factor: float,
    least: int,
    drop: str,
    real: torch.Tensor,
    asked: torch.Tensor,
) -> list[list[bool]]:
    """Choice by choice, in GShard's order or by falling weight, while its expert has room."""
    kept = [[False] * experts.shape[1] for _ in experts]
    size = real.shape[1]
    for group, tokens in enumerate(real.tolist()):
        capacity = max(least, math.ceil(sum(tokens) * experts.shape[1] / E * factor))
        places = [group * size + at for at, counts in enumerate(tokens) if counts]
        if drop == "position":
            ranked = {t: sorted(range(experts.shape[1]), key=lambda k, t=t: -weights[t, k].item()) for t in places}
            order = [(t, ranked[t][number]) for number in range(experts.shape[1]) for t in places]
        else:
            order = sorted(
                ((t, k) for t in places for k in range(experts.shape[1])), key=lambda at: -weights[at].item()
            )
        room = [capacity] * E
        for t, k in order:
            expert = int(experts[t, k])
            if asked[t, k] and room[expert]:
                room[expert] -= 1
                kept[t][k] = True
    return kept


@pytest.mark.parametrize("drop", ["position", "probability"])
@pytest.mark.parametrize(("factor", "least"), [(1.0, 1), (0.45, 1), (0.1, 4), (8.0, 1)])
@pytest.mark.parametrize("divided", [False, True])
def test_capacity_equals_a_naive_loop_over_choices(drop: str, factor: float, least: int, divided: bool) -> None:
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(G * S, E, generator=rng) + torch.tensor([2.0, 1.0, 0.0, 0.0])
    weights, experts = RoutingRule("softmax", E, K).route(logits)
    shuffled = torch.rand(G * S, generator=rng)[:, None] > 0.5  # weights come in no particular order
    weights, experts = (torch.where(shuffled, each.flip(1), each) for each in (weights, experts))
    real, asked = torch.ones(1, G * S, dtype=torch.bool), torch.ones(G * S, K, dtype=torch.bool)
    if divided:
        real = torch.rand(G, S, generator=rng) > 0.3
        asked = torch.rand(G * S, K, generator=rng) > 0.2
        found = within_capacity(weights, experts, E, factor, least, drop, real, asked)  # type: ignore[arg-type]
    else:
        found = within_capacity(weights, experts, E, factor, least, drop)  # type: ignore[arg-type]
    assert found.tolist() == naive(weights, experts, factor, least, drop, real, asked)


def test_first_choices_come_before_second_ones() -> None:
    """Two tokens want expert 0, the first as its second choice: GShard gives the last one the room."""
    experts = torch.tensor([[1, 0], [0, 2]])
    weights = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    found = within_capacity(weights, experts, 3, 0.1, 1)
    assert found.tolist() == [[True, False], [True, True]]


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(UsageError, match="mask is of 6 tokens, but 4"):
        within_capacity(torch.ones(4, 1), torch.zeros(4, 1).long(), 2, 1.0, real=torch.ones(2, 3).bool())
