"""CMoE's clustering against the same computed densely: L1 distances of columns, and scipy's assignment of N x N."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from upcycle.errors import UsageError
from upcycle.splitters.grouping.marker_assignment import marker_assignment

Numbers = NDArray[np.float64]


def marks(tokens: int, neurons: int, k: int, topics: int, seed: int = 0) -> torch.Tensor:
    """Int ``[tokens, k]``: tokens of a topic prefer its neurons, and some neurons fire far more often than others."""
    rng = np.random.default_rng(seed)
    rates = -np.log(np.arange(1, neurons + 1))[rng.permutation(neurons)]
    likes = 3.0 * (rng.integers(0, topics, tokens)[:, None] == np.arange(neurons) % topics)
    return torch.from_numpy((rates + likes + rng.gumbel(size=(tokens, neurons))).argsort(axis=1)[:, -k:].copy())


def dense_columns(markers: torch.Tensor, neurons: torch.Tensor) -> Numbers:
    return np.stack([(markers == neuron).any(dim=1).double().numpy() for neuron in neurons])


def l1(columns: Numbers, centroids: Numbers) -> Numbers:
    return np.abs(columns[:, None] - centroids).sum(axis=-1)  # type: ignore[no-any-return]


def reference(columns: Numbers, experts: int, iterations: int, labels: list[NDArray[np.int64]]) -> list[float]:
    """The least cost of every iteration, each starting from the ``labels`` of the one before."""
    rates = columns.sum(axis=1)
    centroids = columns[np.argsort(-rates, kind="stable")[:experts]]
    costs = []
    for i in range(iterations):
        square = np.repeat(l1(columns, centroids), len(columns) // experts, axis=1)
        rows, places = linear_sum_assignment(square)
        costs.append(float(square[rows, places].sum()))
        centroids = np.stack([columns[labels[i] == j].mean(axis=0) for j in range(experts)])
    return costs


@pytest.mark.parametrize(("size", "experts"), [(96, 8), (256, 4), (512, 16)])
def test_the_cheapest_assignment_to_seeds_and_then_to_means(size: int, experts: int) -> None:
    markers = marks(300, size, 8, topics=experts)
    neurons = torch.arange(size)
    found = [marker_assignment(markers, neurons, experts, intermediate_size=size, iterations=n) for n in (1, 2, 3)]
    columns = dense_columns(markers, neurons)
    expected = reference(columns, experts, 3, [run.labels.numpy() for run in found])
    # Distances to seeds are whole numbers; those to means are rounded to fp32 four times.
    assert found[0].cost == expected[0]
    assert [run.cost for run in found] == pytest.approx(expected, rel=4 * 2**-24)
    assert found[1].cost < found[0].cost
    for run in found:
        assert torch.bincount(run.labels).tolist() == [size // experts] * experts


def test_the_representative_is_the_member_nearest_to_the_mean() -> None:
    markers = marks(200, 64, 6, topics=4)
    neurons = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:50]
    found = marker_assignment(markers, neurons, 4, intermediate_size=64)
    assert sorted(torch.bincount(found.labels).tolist()) == [12, 12, 13, 13]
    columns = dense_columns(markers, neurons)
    for expert, representative in enumerate(found.representatives.tolist()):
        members = np.flatnonzero(found.labels.numpy() == expert)
        distances = l1(columns[members], columns[members].mean(axis=0, keepdims=True))[:, 0]
        own = distances[neurons[members].tolist().index(representative)]
        assert own == pytest.approx(distances.min(), rel=4 * 2**-24)  # as near as fp32 can tell


def test_the_cost_is_what_the_labels_say() -> None:
    markers = marks(150, 40, 5, topics=3)
    neurons = torch.arange(1, 40)
    found = marker_assignment(markers, neurons, 3, intermediate_size=40)
    columns = dense_columns(markers, neurons)
    seeds = columns[np.argsort(-columns.sum(axis=1), kind="stable")[:3]]
    assert found.cost == l1(columns, seeds)[np.arange(39), found.labels.numpy()].sum()


def test_neurons_that_are_never_marked_are_dealt_out() -> None:
    markers = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3], [2, 0]])
    found = marker_assignment(markers, torch.arange(40), 2, intermediate_size=40)
    assert torch.bincount(found.labels).tolist() == [20, 20]
    assert found.labels[0] == found.labels[1]
    assert found.labels[2] == found.labels[3] != found.labels[0]
    columns = dense_columns(markers, torch.arange(40))
    assert [found.cost] == reference(columns, 2, 1, [found.labels.numpy()])


def test_a_neuron_marked_twice_by_a_token_counts_once_and_others_not_at_all() -> None:
    markers = marks(80, 32, 4, topics=2)
    neurons = torch.arange(4, 32)
    once = marker_assignment(markers.int(), neurons, 4, intermediate_size=32)
    twice = marker_assignment(torch.cat([markers, markers], dim=1), neurons, 4, intermediate_size=32)
    foreign = torch.where(markers < 4, 0, markers)
    same = marker_assignment(foreign, neurons, 4, intermediate_size=32)
    for other in (twice, same):
        assert torch.equal(once.labels, other.labels)
        assert torch.equal(once.representatives, other.representatives)
        assert once.cost == other.cost


@pytest.mark.parametrize(
    ("markers", "neurons", "experts", "message"),
    [
        (torch.zeros(3, dtype=torch.long), torch.arange(4), 2, "tokens, marks"),
        (torch.full((3, 2), 8), torch.arange(4), 2, "markers must be integers from 0 to 7"),
        (torch.zeros(3, 2), torch.arange(4), 2, "markers must be integers"),
        (torch.zeros(3, 2, dtype=torch.long), torch.arange(-1, 4), 2, "neurons must be integers"),
        (torch.zeros(3, 2, dtype=torch.long), torch.tensor([1, 1]), 2, "distinct"),
        (torch.zeros(3, 2, dtype=torch.long), torch.arange(4), 5, "4 neurons cannot form 5 experts"),
        (torch.zeros(3, 2, dtype=torch.long), torch.arange(4), 0, "0 experts"),
    ],
)
def test_what_cannot_be_clustered_is_said(
    markers: torch.Tensor, neurons: torch.Tensor, experts: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        marker_assignment(markers, neurons, experts, intermediate_size=8)


def test_iterations_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="iterations"):
        marker_assignment(torch.zeros(3, 2, dtype=torch.long), torch.arange(4), 2, intermediate_size=8, iterations=0)
