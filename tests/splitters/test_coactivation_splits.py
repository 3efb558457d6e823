"""The splits by co-activation: the graph's weights, its cut, and how parts are made equal."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from upcycle.calibration.decide_layer import generator
from upcycle.errors import EnvironmentFault
from upcycle.ffn.activations import Activations
from upcycle.ffn.feed_forward import FeedForward
from upcycle.splitters.coactivation_graph import CoactivationGraph, CoactivationGraphParameters, cut, rebalanced
from upcycle.splitters.coactivation_kmeans import CoactivationKMeans, CoactivationKMeansParameters
from upcycle.splitters.grouping.neuron_profiles import coactivation

D, F, E = 8, 48, 4


def planted() -> tuple[FeedForward, Activations, torch.Tensor]:
    """Neurons that answer to one of E kinds of tokens, each at its own strength, and which kind that is."""
    rng = torch.Generator().manual_seed(3)
    truth = torch.randperm(F, generator=rng) % E
    strength = 0.8 + 0.4 * torch.rand(F, 1, generator=rng)  # all rise above the mean, where they answer
    directions = torch.eye(E, D)
    gate, up = directions[truth] * strength, directions[truth] + 0.02 * torch.randn(F, D, generator=rng)
    ffn = FeedForward(0, gate, up, torch.randn(D, F, generator=rng), torch.ones(D), "silu")
    kind = torch.randint(E, (400,), generator=rng)
    x = directions[kind] * (1 + torch.rand(400, 1, generator=rng))
    return ffn, Activations.of(ffn, x + 0.02 * torch.randn(400, D, generator=rng), batch=128), truth


def same_groups(labels: torch.Tensor, truth: torch.Tensor) -> bool:
    return bool(((labels[:, None] == labels) == (truth[:, None] == truth)).all())


def edges_of(percentile: int, weights: np.ndarray) -> dict[tuple[int, int], int]:
    """MoEfication's rule, edge by edge."""
    bar = 0.0
    while bar == 0:
        bar, percentile = float(np.percentile(weights.reshape(-1), percentile)), percentile + 10
    scaled = weights / np.float32(bar * 0.99)
    size = len(weights)
    return {(i, j): int(scaled[i, j]) for i in range(size) for j in range(size) if i != j and scaled[i, j] >= 1}


@pytest.mark.parametrize(("threshold", "percentile"), [(0.0, 10), (1.0, 10), (1.0, 80)])
def test_the_graph_given_to_metis(threshold: float, percentile: int) -> None:
    _, activations, _ = planted()
    weights = coactivation(activations, torch.arange(F), threshold, 8)
    weights = (weights + weights.T) / 2
    before, seen = weights.clone(), {}

    def part_graph(parts: int, graph: Any, eweights: np.ndarray, recursive: bool, options: dict[str, int]) -> Any:
        starts, others = graph
        for i in range(len(starts) - 1):
            for at in range(starts[i], starts[i + 1]):
                seen[i, int(others[at])] = int(eweights[at])
        assert (parts, recursive, options) == (E, False, {"seed": 5})
        return SimpleNamespace(vertex_part=[i % E for i in range(F)])

    metis = SimpleNamespace(
        part_graph=part_graph,
        CSRAdjacency=lambda a, b: (a, b),
        Options=dict,
        zero_copy_dtype=lambda: np.dtype(np.int64),
    )
    labels = cut(metis, weights, E, seed=5, percentile=percentile)
    assert labels.tolist() == [i % E for i in range(F)]
    assert torch.equal(weights, before)
    expected = edges_of(percentile, weights.numpy())
    assert seen.keys() == expected.keys()
    # Integer weights of fp32 quotients may fall on either side.
    assert all(abs(seen[edge] - expected[edge]) <= 1 for edge in expected)
    assert all((j, i) in seen and seen[j, i] == weight for (i, j), weight in seen.items())


@pytest.mark.parametrize(
    "keys", [{}, {"clip_tokens": 0}, {"threshold": 0.0, "percentile": 80}, {"rebalance": "random"}]
)
def test_the_graph_cut_finds_planted_groups(keys: dict[str, Any]) -> None:
    pytest.importorskip("pymetis")
    ffn, activations, truth = planted()
    method = CoactivationGraph(CoactivationGraphParameters(**keys))
    assert same_groups(method.labels(torch.arange(F), E, ffn, generator(0, 0, "method"), activations), truth)


@pytest.mark.parametrize("keys", [{}, {"features": "gram"}, {"sketch": 32}])
def test_clusters_of_profiles_find_planted_groups(keys: dict[str, Any]) -> None:
    ffn, activations, truth = planted()
    method = CoactivationKMeans(CoactivationKMeansParameters(n_init=4, **keys))
    assert same_groups(method.labels(torch.arange(F), E, ffn, generator(0, 0, "method"), activations), truth)


def test_profiles_do_not_depend_on_the_size_of_down() -> None:
    ffn, activations, _ = planted()
    method = CoactivationKMeans(CoactivationKMeansParameters())
    longer = FeedForward(0, ffn.gate, ffn.up, ffn.down * torch.rand(F), ffn.norm, "silu")
    first, second = (
        method.labels(torch.arange(F), E, dense, generator(0, 0, "method"), activations) for dense in (ffn, longer)
    )
    assert torch.equal(first, second)


def test_metis_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    ffn, activations, _ = planted()
    method = CoactivationGraph(CoactivationGraphParameters())
    with pytest.raises(EnvironmentFault) as caught:
        method.labels(torch.arange(F), E, ffn, generator(0, 0, "method"), activations)
    assert caught.value.exit_code == 4
    assert "pip install pymetis" in str(caught.value.hint)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("random", [False, True])
def test_rebalancing_moves_only_the_surplus(seed: int, random: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    points, parts = 20 + seed, 2 + seed % 5
    labels = torch.randint(1 + seed % parts, (points,), generator=rng)  # some parts are empty
    weights = torch.rand(points, points, generator=rng)
    moved = rebalanced(labels, weights + weights.T, parts, rng if random else None)
    counts, before = torch.bincount(moved, minlength=parts), torch.bincount(labels, minlength=parts)
    assert counts.max() - counts.min() <= 1
    size, extra = divmod(points, parts)
    wanted = sorted([size + 1] * extra + [size] * (parts - extra))
    surplus = sum(max(0, a - b) for a, b in zip(sorted(before.tolist()), wanted, strict=True))
    assert int((moved != labels).sum()) == surplus


def test_rebalancing_lets_go_what_is_tied_least() -> None:
    # Part 0 has two points too many, part 1 none too many, part 2 lacks two.
    labels = torch.tensor([0] * 5 + [1] * 3 + [2])
    weights = torch.rand(9, 9, generator=torch.Generator().manual_seed(4)).double()
    weights = weights + weights.T

    def loss(point: int) -> float:
        inside = sum(weights[point, other].item() for other in range(5) if other != point)
        return inside - weights[point, 8].item()

    best = min(itertools.combinations(range(5), 2), key=lambda pair: loss(pair[0]) + loss(pair[1]))
    moved = rebalanced(labels, weights, 3)
    assert (moved != labels).nonzero().flatten().tolist() == list(best)
    assert (moved[list(best)] == 2).all()


def test_a_diagonal_decides_nothing() -> None:
    rng = torch.Generator().manual_seed(6)
    labels, weights = torch.zeros(12, dtype=torch.int64), torch.rand(12, 12, generator=rng).double()
    heavy = weights + torch.diag(torch.rand(12, generator=rng).double() * 100)
    assert torch.equal(rebalanced(labels, weights, 3), rebalanced(labels, heavy, 3))
