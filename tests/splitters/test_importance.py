"""LLaMA-MoE's gradient splits against the loops of their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from upcycle.calibration.decide_layer import generator
from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ZERO_NEURON, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.base import Method
from upcycle.splitters.importance import Importance, ImportanceParameters, merge_similar

D, F, E = 6, 40, 4


def layer() -> FeedForward:
    rng = torch.Generator().manual_seed(1)
    gate, up, down = (torch.randn(shape, generator=rng) for shape in ((F, D), (F, D), (D, F)))
    return FeedForward(0, gate, up, down, torch.ones(D), "silu")


def vectors(clusters: int = E) -> torch.Tensor:
    """Scores with a part that all clusters have in common, and ties."""
    rng = torch.Generator().manual_seed(2)
    return ((torch.rand(clusters, F, generator=rng) + torch.rand(F, generator=rng)) * 20).round()


def split(importance: torch.Tensor | None, shared: int = 0, pad: bool = False, **keys: Any) -> LayerBlueprint:
    method = Importance(ImportanceParameters(**keys))
    shape = MoeShape(E, 2, shared, method.expert_size(F, E, shared, pad), (0,))
    given = Activations.of(layer(), torch.randn(30, D), importance=importance)
    return method.blueprint(layer(), shape, 1.0, generator(0, 0, "method"), given)


def lists(experts: Any) -> list[list[int]]:
    return [expert.neurons.tolist() for expert in experts]


def ranked(scores: torch.Tensor) -> list[list[int]]:
    return [sorted(range(F), key=lambda j: (-row[j].item(), j)) for row in scores]


def greedy(scores: torch.Tensor, neurons: list[int], size: int) -> list[list[int]]:
    """Again and again the globally best pair."""
    free, experts = set(neurons), [[] for _ in range(E)]
    while free:
        open_experts = [e for e in range(E) if len(experts[e]) < size]
        _, j, e = min((-scores[e, j].item(), j, e) for j in free for e in open_experts)
        free.remove(j)
        experts[e].append(j)
    return [sorted(expert) for expert in experts]


def residual(scores: torch.Tensor, count: int, size: int) -> list[int]:
    """LLaMA-MoE's count procedure, as its code has it."""
    chosen: list[int] = []
    while len(chosen) < count:
        tops = [[j for j in row if j not in chosen][:size] for row in ranked(scores)]
        wanted = [sum(j in top for top in tops) for j in range(F)]
        most = [j for j in range(F) if wanted[j] == max(wanted)]
        chosen += most[: count - len(chosen)]
    return chosen


def test_independent_is_the_greedy_loop() -> None:
    assert lists(split(vectors()).routed) == greedy(vectors(), list(range(F)), F // E)


def test_independent_with_shared_experts_deals_out_the_rest() -> None:
    made = split(vectors(), shared=1)
    (shared,) = lists(made.shared)
    assert lists(made.routed) == greedy(vectors(), [j for j in range(F) if j not in shared], 8)


def test_sharing_inner_is_the_top_of_every_list() -> None:
    made = split(vectors(), variant="sharing_inner")
    assert lists(made.routed) == [sorted(row[: F // E]) for row in ranked(vectors())]
    assert len(made.neurons.unique()) < F  # experts overlap
    wide = split(vectors(), variant="sharing_inner", expert_size=24)
    assert lists(wide.routed) == [sorted(row[:24]) for row in ranked(vectors())]


@pytest.mark.parametrize("share_neurons", [True, False])
def test_sharing_inter(share_neurons: bool) -> None:
    made = split(vectors(), shared=1, variant="sharing_inter", share_neurons=share_neurons)
    common = residual(vectors(), 8, 8)
    assert lists(made.shared) == [sorted(common)]
    rest = [[j for j in row if j not in common] for row in ranked(vectors())]
    if share_neurons:
        assert lists(made.routed) == [sorted(row[:8]) for row in rest]
    else:
        assert lists(made.routed) == greedy(vectors(), sorted(rest[0]), 8)


def test_several_shared_experts_are_filled_in_the_order_of_demand() -> None:
    made = split(vectors(), shared=4, variant="sharing_inter")
    common = residual(vectors(), 20, 5)
    assert lists(made.shared) == [sorted(common[i : i + 5]) for i in range(0, 20, 5)]


@pytest.mark.parametrize(
    ("keys", "kind", "exact"),
    [
        ({}, "partition", True),
        ({"variant": "sharing_inner"}, "overlap", False),
        ({"variant": "sharing_inter"}, "overlap", False),
        ({"variant": "sharing_inter", "share_neurons": False}, "partition", True),
    ],
)
def test_what_a_variant_promises(keys: dict[str, Any], kind: str, exact: bool) -> None:
    method: Method = Importance(ImportanceParameters(**keys))
    assert (method.kind, method.exact_when_all_active) == (kind, exact)
    assert (Importance.kind, Importance.exact_when_all_active) == ("partition", True)


def test_lists_that_run_out_are_filled_with_zero_neurons() -> None:
    made = split(vectors(), shared=2, pad=True, variant="sharing_inter")
    assert made.intermediate_size == 8
    method = Importance(ImportanceParameters(variant="sharing_inner"))
    given = Activations.of(layer(), torch.randn(30, D), importance=vectors())
    short = method.blueprint(layer(), MoeShape(E, 2, 3, 12, (0,)), 1.0, generator(0, 0, "method"), given)
    assert all(int((expert.neurons == ZERO_NEURON).sum()) == 12 - (F - 36) for expert in short.routed)


@pytest.mark.parametrize("variant", ["independent", "sharing_inner", "sharing_inter"])
def test_importance_that_says_nothing(variant: str) -> None:
    made = split(torch.zeros(E, F), shared=1, variant=variant)
    assert {len(neurons) for neurons in lists(made.routed + made.shared)} == {8}


def test_too_few_clusters() -> None:
    for importance in (None, vectors(E - 1)):
        with pytest.raises(UsageError, match=f"each of {E} experts") as caught:
            split(importance)
        assert "--calibration" in str(caught.value.hint)


def test_too_many_clusters_are_merged() -> None:
    few = torch.eye(3, 8) * torch.tensor([[1.0], [2.0], [3.0]])
    many = torch.cat([few, few[1:2] * 1.5, few[1:2] * 2])  # three vectors along the second axis
    assert torch.allclose(merge_similar(many, 3), torch.diag(torch.tensor([1, 3.0, 3, 0, 0, 0, 0, 0]))[:3])
    assert torch.equal(merge_similar(few, 3), few)
    assert len(split(vectors(7)).routed) == E


@pytest.mark.parametrize(
    ("keys", "shared", "message"),
    [
        ({"variant": "sharing_inter"}, 0, "there are none"),
        ({"expert_size": 12}, 0, "do not overlap"),
        ({"variant": "sharing_inner", "expert_size": F + 1}, 0, "has 40"),
        ({"variant": "sharing_inter", "expert_size": 21}, 1, "has 40"),
    ],
)
def test_sizes_that_cannot_be(keys: dict[str, Any], shared: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Importance(ImportanceParameters(**keys)).expert_size(F, E, shared, pad=False)
