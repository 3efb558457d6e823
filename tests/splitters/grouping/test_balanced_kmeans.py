"""Balanced k-means: sizes, inertia and optimality restated in fp64, the ways it can start, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from upcycle.errors import UsageError
from upcycle.splitters.grouping import balanced_kmeans as module
from upcycle.splitters.grouping.balanced_kmeans import balanced_kmeans, balanced_kmeans_result


def heaps(
    points: int, dimensions: int, clusters: int, noise: float = 0.1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in heaps of equal size, and which heap each is from."""
    rng = torch.Generator().manual_seed(seed)
    heap = torch.arange(points) % clusters
    centres = torch.randn(clusters, dimensions, generator=rng)
    return centres[heap] + noise * torch.randn(points, dimensions, generator=rng), heap


def inertia(points: torch.Tensor, labels: torch.Tensor) -> float:
    x = points.double().numpy()
    return float(
        sum(
            ((x[(labels == j).numpy()] - x[(labels == j).numpy()].mean(axis=0)) ** 2).sum()
            for j in range(int(labels.max()) + 1)
        )
    )


def assert_balanced(labels: torch.Tensor, points: int, clusters: int) -> None:
    assert (labels.dtype, labels.shape) == (torch.int64, (points,))
    sizes = torch.bincount(labels)
    assert len(sizes) == clusters
    assert {points // clusters} <= set(sizes.tolist()) <= {points // clusters, points // clusters + 1}


@pytest.mark.parametrize("sketch", [None, 4])
@pytest.mark.parametrize("points", [240, 243])
def test_heaps_are_found(points: int, sketch: int | None) -> None:
    x, heap = heaps(points, 40, 6)
    labels = balanced_kmeans(x, 6, sketch=sketch)
    assert_balanced(labels, points, 6)
    assert len(set(zip(labels.tolist(), heap.tolist(), strict=True))) == 6  # one label per heap


@pytest.mark.parametrize(("points", "clusters"), [(1, 1), (7, 1), (7, 7), (50, 7), (60, 40)])
@pytest.mark.parametrize("kind", ["random", "zero", "duplicates", "far away"])
def test_sizes_inertia_and_centroids_of_awkward_points(kind: str, points: int, clusters: int) -> None:
    x = torch.randn(points, 5, generator=torch.Generator().manual_seed(1))
    x = {"random": x, "zero": x * 0, "duplicates": x[torch.arange(points) % 3], "far away": x + 1000}[kind]
    found = balanced_kmeans_result(x, clusters)
    assert_balanced(found.labels, points, clusters)
    means = np.stack([x.double().numpy()[(found.labels == j).numpy()].mean(axis=0) for j in range(clusters)])
    # Means of fp32 numbers, summed in fp32: off by at most N units in the last place of the largest.
    close = points * torch.finfo(torch.float32).eps * x.abs().max().item()
    np.testing.assert_allclose(found.centroids.numpy(), means, rtol=0, atol=close)
    expected = inertia(x, found.labels)
    assert found.inertia == pytest.approx(expected, rel=1e-4, abs=points * 5 * close**2 + 1e-12)
    assert torch.equal(balanced_kmeans(x, clusters), found.labels)


def test_a_fixed_point_of_assigning_and_averaging() -> None:
    """With no tolerance it ends where the exact optimum for its centroids, one column per place, is no cheaper."""
    x = torch.randn(240, 6, generator=torch.Generator().manual_seed(2))
    found = balanced_kmeans_result(x, 6, tolerance=0.0)
    means = np.stack([x.double().numpy()[(found.labels == j).numpy()].mean(axis=0) for j in range(6)])
    cost = ((x.double().numpy()[:, None] - means) ** 2).sum(axis=-1)
    rows, columns = linear_sum_assignment(np.repeat(cost, 40, axis=1))
    assert found.inertia == pytest.approx(np.repeat(cost, 40, axis=1)[rows, columns].sum(), rel=1e-6)
    assert 1 < found.iterations < 100


def test_more_iterations_and_more_seedings_never_hurt() -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(3))
    by_iterations = [balanced_kmeans_result(x, 8, max_iter=n, tolerance=0.0) for n in (1, 2, 4, 8)]
    assert [found.iterations for found in by_iterations] == [1, 2, 4, 8]
    found = [run.inertia for run in by_iterations]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]
    seedings = [balanced_kmeans_result(x, 8, n_init=n).inertia for n in (1, 8)]
    assert seedings[1] < seedings[0]


def test_starting_in_the_main_directions_ends_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = heaps(300, 200, 12, noise=1.5, seed=4)
    full = np.median([balanced_kmeans_result(x, 8, seed=s, sketch=None).inertia for s in range(3)])
    used = []
    main = module._main_directions
    monkeypatch.setattr(module, "_main_directions", lambda *args: used.append(args[1]) or main(*args))
    quick = np.median([balanced_kmeans_result(x, 8, seed=s, sketch=16).inertia for s in range(3)])
    assert used == [16] * 3
    assert quick <= 1.01 * full  # what seeds alone differ by
    balanced_kmeans_result(x, 20, sketch=16)
    assert used[-1] == 40  # at least two directions per cluster


def test_points_far_from_the_origin_are_clustered_as_well() -> None:
    x, heap = heaps(200, 20, 4)
    labels = balanced_kmeans(x + 300, 4)
    assert len(set(zip(labels.tolist(), heap.tolist(), strict=True))) == 4


def test_the_seed_decides() -> None:
    x = torch.randn(300, 50, generator=torch.Generator().manual_seed(5))
    labels = [balanced_kmeans(x, 6, seed=seed, sketch=8) for seed in (0, 0, 1)]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_bfloat16_points_are_left_alone() -> None:
    x = heaps(60, 10, 3)[0].bfloat16()
    before = x.clone()
    assert torch.equal(balanced_kmeans(x, 3), balanced_kmeans(x.float(), 3))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (torch.zeros(4), {}, "points, dimensions"),
        (torch.zeros(2, 3), {"clusters": 3}, "2 points cannot form 3 clusters"),
        (torch.zeros(2, 3), {"clusters": 0}, "0 clusters"),
        (torch.tensor([[1.0], [float("nan")]]), {}, "not finite"),
        (torch.tensor([[1.0], [float("inf")]]), {}, "not finite"),
        (torch.zeros(2, 3), {"n_init": 0}, "at least 1"),
        (torch.zeros(2, 3), {"max_iter": 0}, "at least 1"),
        (torch.zeros(2, 3), {"sketch": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_clustered_is_said(points: torch.Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        balanced_kmeans(points, **{"clusters": 1, **options})
