"""k-means whose clusters all have the same size.

Lloyd's iteration with the assignment replaced by the cheapest balanced one (Bradley, Bennett, Demiriz, "Constrained
k-means clustering", MSR-TR-2000-65), so that no step can raise the inertia. It starts from k-means++ (Arthur and
Vassilvitskii, 2007). A pass over all coordinates is what costs time, so it first settles in the few directions in which
the points differ most (Cohen et al., "Dimensionality reduction for k-means clustering", arXiv 1410.6801), found by a
randomised range finder (Halko, Martinsson, Tropp, arXiv 0909.4061). The original coordinates have the last word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from upcycle.errors import UsageError
from upcycle.splitters.grouping.balanced_assignment import balanced_assignment, one_thread

_BLOCK = 1 << 18  # numbers that are copied and worked on at a time: as many as the processor's cache holds
# This many points say well enough in which directions all points differ.
_RANGE_POINTS = 2048
# A difference of squares that leaves this share of them has lost three bits to cancellation at most.
_HARMLESS = 1 / 8
# If fewer than one point in this many moved, sums are updated by those alone.
_FEW = 6
# From so many points per cluster on, adding them one by one is faster than a matrix product.
_MANY = 128
# In the main directions the tolerance is this many times larger: the last refinements are made in all coordinates anyway.
_ROUGHER = 10


@dataclass(frozen=True)
class BalancedClusters:
    """A clustering of N points into E clusters of equal size.

    Attributes:
        labels: int64 ``[N]``.
        centroids: fp32 ``[E, D]``, the clusters' means.
        inertia: the sum of squared distances to them.
        iterations: how many assignments were made in the original coordinates.
    """

    labels: torch.Tensor
    centroids: torch.Tensor
    inertia: float
    iterations: int


def balanced_kmeans(
    points: torch.Tensor,
    clusters: int,
    *,
    seed: int = 0,
    n_init: int = 1,
    max_iter: int = 100,
    tolerance: float = 1e-4,
    sketch: int | None = 32,
) -> torch.Tensor:
    """Return the labels, int64 ``[N]``, of clusters whose sizes differ by at most one; see :func:`balanced_kmeans_result`."""
    return balanced_kmeans_result(
        points, clusters, seed=seed, n_init=n_init, max_iter=max_iter, tolerance=tolerance, sketch=sketch
    ).labels


def balanced_kmeans_result(
    points: torch.Tensor,
    clusters: int,
    *,
    seed: int = 0,
    n_init: int = 1,
    max_iter: int = 100,
    tolerance: float = 1e-4,
    sketch: int | None = 32,
) -> BalancedClusters:
    """Cluster ``points`` ``[N, D]`` into ``clusters`` of equal size (differing by at most one), distances in fp32.

    Args:
        points: ``[N, D]``, finite.
        clusters: ``1 <= clusters <= N``.
        seed: of the seeding and the directions; the same seed and number of threads give the same labels.
        n_init: seedings, of which the best counts.
        max_iter: assignments at most, in the main directions and in the original coordinates each.
        tolerance: stop when an assignment lowers the inertia by no more than this share.
        sketch: main directions to start in (at least two per cluster), if there are over twice as many points and
            dimensions; ``None`` does without.

    Raises:
        UsageError: a value that is not finite, or a number that is out of range.
    """
    if points.ndim != 2:
        raise UsageError(f"points to cluster are [points, dimensions], not {list(points.shape)}")
    if not 1 <= clusters <= len(points):
        raise UsageError(f"{len(points)} points cannot form {clusters} clusters: give 1 to {len(points)} clusters")
    if n_init < 1 or max_iter < 1 or (sketch is not None and sketch < 1):
        raise UsageError(f"n_init, max_iter and sketch must be at least 1, not {n_init}, {max_iter}, {sketch}")
    points = points.detach().cpu().float()
    squares = _sum_of_squares(points)
    if not math.isfinite(squares):
        raise UsageError("the points to cluster are not finite, or so large that their squares are not")
    rng = torch.Generator().manual_seed(seed)
    directions = 0 if sketch is None else max(sketch, 2 * clusters)
    if 0 < 2 * directions < min(points.shape):
        small = _main_directions(points, directions, rng)
        with one_thread():
            starts = [_plus_plus(small, clusters, rng) for _ in range(n_init)]
            found = _best(small, _sum_of_squares(small), starts, max_iter, _ROUGHER * tolerance, rough=True)
        found = _lloyd(points, squares, _means(points, squares, found.labels, clusters), max_iter, tolerance)
    else:
        starts = [_plus_plus(points, clusters, rng) for _ in range(n_init)]
        found = _best(points, squares, starts, max_iter, tolerance)
    inertia = found.means.within
    if inertia < _HARMLESS * squares:
        inertia = _inertia(points, found.labels, found.means.centroids)
    return BalancedClusters(found.labels, found.means.centroids, inertia, found.iterations)


@dataclass(frozen=True)
class _Means:
    """Centroids, fp32 ``[E, D]``, and the sums of squares within clusters and between them, whose total never changes."""

    centroids: torch.Tensor
    within: float = math.inf
    between: float = -math.inf
    labels: torch.Tensor | None = None  # of the points that were averaged


@dataclass(frozen=True)
class _ClusteringRun:
    labels: torch.Tensor
    means: _Means
    iterations: int


def _best(
    points: torch.Tensor,
    squares: float,
    seeds: list[torch.Tensor],
    max_iter: int,
    tolerance: float,
    rough: bool = False,
) -> _ClusteringRun:
    """Return the run that ends with the least inertia."""
    starts = (_Means(centroids) for centroids in seeds)
    runs = (_lloyd(points, squares, start, max_iter, tolerance, rough) for start in starts)
    return max(runs, key=lambda run: run.means.between)


def _lloyd(
    points: torch.Tensor, squares: float, start: _Means, max_iter: int, tolerance: float, rough: bool = False
) -> _ClusteringRun:
    """Assign and average in turn until another pass would gain too little; ``squares`` is the points' sum of squares.

    ``rough`` clusters have only nearly the same size, which is enough where a better run follows.
    """
    means, prices = start, None
    for iteration in range(1, max_iter + 1):  # noqa: B007 - the last one is returned
        labels, prices = balanced_assignment(_costs(points, means.centroids), prices=prices, rough=rough)
        if math.isinf(means.within):
            prices = None  # those of single points, which lie much further apart than means
        before, means = means, _means(points, squares, labels, len(means.centroids), means)
        # Not from `within`, a small difference of large numbers when the points lie far from the origin.
        if means.between - before.between <= tolerance * means.within:
            break
    return _ClusteringRun(labels, means, iteration)


def _main_directions(points: torch.Tensor, directions: int, rng: torch.Generator) -> torch.Tensor:
    """Return coordinates ``[N, directions]`` of the points, less their mean, in nearly their first principal components."""
    some = points[:: max(1, len(points) // _RANGE_POINTS)]
    seen = some @ torch.randn(points.shape[1], directions, generator=rng)
    basis = torch.linalg.qr(some.T @ (seen - seen.mean(dim=0))).Q
    small: torch.Tensor = points @ basis
    small -= small.mean(dim=0)
    return small


def _plus_plus(points: torch.Tensor, clusters: int, rng: torch.Generator) -> torch.Tensor:
    """Draw k-means++ seeds ``[E, D]``: each is the one of a few candidates that lowers the inertia most."""
    candidates = 2 + int(math.log(clusters))
    squares = torch.linalg.vector_norm(points, dim=1).square()
    chosen = torch.randint(len(points), (1,), generator=rng)
    nearest = _squared_distances(points, squares, chosen)[:, 0]
    while len(chosen) < clusters:
        mass = nearest.double().cumsum(0)
        drawn = torch.rand(candidates, generator=rng, dtype=torch.float64) * mass[-1]
        tried = torch.searchsorted(mass, drawn, right=True).clamp_(max=len(points) - 1)
        distances = torch.minimum(_squared_distances(points, squares, tried), nearest[:, None])
        best = distances.sum(dim=0, dtype=torch.float64).argmin()
        nearest = distances[:, best]
        chosen = torch.cat([chosen, tried[best, None]])
    return points[chosen]


def _squared_distances(points: torch.Tensor, squares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return squared distances ``[N, C]`` from every point to the ``C`` chosen ones."""
    distances = torch.addmm(squares[:, None] + squares[chosen], points, points[chosen].T, alpha=-2).clamp_(min=0)
    distances[chosen, torch.arange(len(chosen))] = 0  # exactly, or rounding could let the same seed be drawn again
    return distances


def _costs(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return squared distances ``[N, E]`` less a constant of each point, which changes no choice.

    With ``m`` the mean of the centroids, ``|x - c|^2 = |x - m|^2 - 2 x.(c - m) + |c - m|^2 + 2 m.(c - m)``, and the first term is
    left out: however far the points lie from the origin, fp32 keeps what tells the clusters apart.
    """
    middle = centroids.mean(dim=0)
    offsets = centroids - middle
    constant = offsets.double().square().sum(dim=1) + 2 * (offsets.double() @ middle.double())
    return torch.addmm(constant.float(), points, offsets.T, alpha=-2)


def _means(
    points: torch.Tensor, squares: float, labels: torch.Tensor, clusters: int, before: _Means | None = None
) -> _Means:
    """Compute the clusters' means by one matrix product, which all threads share; from the points that moved alone, if few did."""
    sizes = torch.bincount(labels, minlength=clusters)[:, None].clamp(min=1).double()  # a rough cluster may be empty
    sums = None
    if before is not None and before.labels is not None:
        moved = (labels != before.labels).nonzero()[:, 0]
        if len(moved) * _FEW < len(points):
            old, new = before.labels[moved], labels[moved]
            change = torch.zeros(clusters, len(moved)).scatter_(0, old[None], -1.0).scatter_(0, new[None], 1.0)
            had = torch.bincount(before.labels, minlength=clusters)[:, None]
            sums = before.centroids * had + change @ points[moved]
    if sums is None:
        sums = _sums(points, labels, clusters)
    centroids = sums / sizes.float()
    exact = centroids.double()
    middle = (sizes * exact).sum(dim=0) / len(points)
    within = squares - (sizes * exact.square()).sum().item()
    return _Means(centroids, max(within, 0.0), (sizes * (exact - middle).square()).sum().item(), labels)


def _sums(points: torch.Tensor, labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """Return ``[E, D]``: the sum of every cluster's points."""
    if len(points) < _MANY * clusters:
        return torch.zeros(clusters, len(points)).scatter_(0, labels[None], 1.0) @ points
    # A matrix product with so few rows would read the points several times.
    starts = torch.bincount(labels, minlength=clusters).cumsum(0)[:-1]
    order, starts = labels.argsort(stable=True), torch.cat([starts.new_zeros(1), starts])
    found: torch.Tensor = torch._embedding_bag_forward_only(points, order, starts, False, 0, False, None, False)[0]
    return found


def _sum_of_squares(points: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(points, dim=1).double().square().sum())


def _inertia(points: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor) -> float:
    """Sum the squared distances of points to their centroids, subtracted before they are squared, a block at a time."""
    rows = max(1, _BLOCK // max(1, points.shape[1]))
    with one_thread():
        blocks = zip(points.split(rows), labels.split(rows), strict=True)
        return sum(_sum_of_squares(centroids[where].sub_(some)) for some, where in blocks)
