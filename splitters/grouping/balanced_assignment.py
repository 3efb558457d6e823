"""Assign points to clusters of equal size at the least total cost.

A transportation problem of N points and E clusters. Its dual has one price per cluster: Newton's method on the dual,
smoothed by an entropy whose temperature is lowered in stages, finds the prices up to a few misplaced points, all points at
once. Successive shortest paths over the graph of the clusters (Ahuja, Magnanti, Orlin, "Network Flows", section 9.7) then
move those, and keep what is assigned optimal for its sizes at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from upcycle.errors import UsageError

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

# Temperatures, relative to the mean difference of a point's costs: the first one without prices to start from, the first one with
# them, and the factor by which each next one is lower.
_COLD, _WARM, _COOLING = 1.0, 1 / 64, 8.0
_STEPS_PER_STAGE = 6
# Shares of all points: a stage is done when as few as _MISPLACED are misplaced (eight times as many in the earlier stages), and the
# prices it began with were useless when more than _LOST still are.
_MISPLACED, _LOST = 1e-3, 0.1
_UNDECIDED = 8.0  # points that the last temperature leaves undecided, about
# This many points per cluster give nearly the prices that all points have, which are then computed from there.
_ENOUGH = 128


def balanced_assignment(
    cost: torch.Tensor, *, prices: torch.Tensor | None = None, rough: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the cheapest assignment in which the sizes of two clusters differ by at most one point.

    Optimal for ``cost`` up to its own rounding: moves whose costs differ by less than the rounding of what a point pays on
    average are taken as equal. The same input gives the same labels.

    Args:
        cost: ``[N, E]``, finite, ``1 <= E <= N``.
        prices: ``[E]`` of a similar problem, to start from.
        rough: leave the few points that the smoothed prices misplace where they are: the sizes are only nearly the same.

    Returns:
        Labels, int64 ``[N]``, and prices, fp64 ``[E]``: up to rounding, every point is where its ``cost + prices`` is least.

    Raises:
        UsageError: the cost is not finite, or there are fewer points than clusters or no cluster.
    """
    with one_thread():
        _check(cost, prices)
        clusters = cost.shape[1]
        single = cost.dtype.is_floating_point and cost.dtype != torch.float64
        cost = cost.detach().cpu().to(torch.float32 if single else torch.float64)
        # A constant added to all of a point's costs changes no choice, and fp32 has no digits to spare for it.
        relative = cost - cost.amin(dim=1, keepdim=True)
        scale = relative.mean(dtype=torch.float64).item()
        start = None if prices is None else prices.detach().cpu().double()
        known = scale > 0
        start = _smooth_prices(relative.float(), start, scale, rough) if known else cost.new_zeros(clusters).double()
        if rough:
            return (relative + start).argmin(dim=1), start
        moves = _Moves(relative.double().numpy(), start.numpy(), torch.finfo(relative.dtype).eps)
    moves.balance()
    return torch.from_numpy(moves.labels), torch.from_numpy(moves.prices[:clusters].copy())


@contextmanager
def one_thread() -> Iterator[None]:
    """Make torch use one thread for a while: passes over a few hundred thousand numbers take less time than waking others.

    Meanwhile numbers below fp32's normal range count as zero; softmax makes many of them, and each costs a hundredfold.
    """
    threads, flushing = torch.get_num_threads(), (torch.tensor(1e-39) * 0.5).item() == 0
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushing)
        torch.set_num_threads(threads)


def _check(cost: torch.Tensor, prices: torch.Tensor | None) -> None:
    if cost.ndim != 2:
        raise UsageError(f"the cost of a balanced assignment is [points, clusters], not {list(cost.shape)}")
    points, clusters = cost.shape
    if not 1 <= clusters <= points:
        raise UsageError(f"{points} points cannot be assigned to {clusters} clusters: give 1 to {points} clusters")
    if not torch.isfinite(cost).all():
        raise UsageError("the cost of a balanced assignment is not finite")
    if prices is not None and (prices.shape != (clusters,) or not torch.isfinite(prices).all()):
        raise UsageError(f"prices must be {clusters} finite numbers, not {list(prices.shape)}")


def _smooth_prices(cost: torch.Tensor, start: torch.Tensor | None, scale: float, rough: bool) -> torch.Tensor:
    """Find prices ``[E]`` (fp64) at which a softmin of ``cost + prices`` (fp32 ``[N, E]``) fills all clusters alike.

    The last temperature leaves a few points per cluster undecided: below it, Newton's method has no curvature. Of many points
    a sample is solved first, and all of them start from its prices; ``rough`` prices solve all at the last temperature only.
    """
    points, clusters = cost.shape
    last = scale * min(_WARM, max(_UNDECIDED / points, 1e-5))
    warm = scale * _WARM
    stride = points // (_ENOUGH * clusters)
    if stride > 1:
        start = _smooth_prices(cost[::stride].contiguous(), start, scale, rough)
        warm = last if rough else min(warm, _COOLING * last)
    nothing = torch.zeros(clusters, dtype=torch.float64)
    # A constant added to all prices changes nothing: take their mean as zero.
    prices, temperature = (nothing, scale * _COLD) if start is None else (start - start.mean(), warm)
    while True:
        most = _MISPLACED if temperature <= last else 8 * _MISPLACED
        prices, misplaced = _newton(cost / -temperature, prices / temperature, most)
        prices *= temperature
        if start is not None and misplaced > _LOST:
            # The prices to start from were those of too different a problem: begin without.
            start, prices, temperature = None, nothing, scale * _COLD
        elif temperature <= last:
            return prices
        else:
            temperature = max(temperature / _COOLING, last)


def _newton(logits: torch.Tensor, prices: torch.Tensor, most: float) -> tuple[torch.Tensor, float]:
    """Climb the concave dual ``-sum_i logsumexp_j(logits_ij - p_j) - N / E * sum_j p_j`` at one temperature.

    Ends when at most the share ``most`` of the points is misplaced, or after some steps; returns prices and that share.
    """
    points, clusters = logits.shape
    size = points / clusters
    shares = (logits - prices.float()).softmax(dim=1)
    for steps in range(_STEPS_PER_STAGE + 1):
        filled = shares.sum(dim=0).double()
        gradient = filled - size
        misplaced = gradient.abs().sum().item() / points
        if misplaced <= most or steps == _STEPS_PER_STAGE:
            break
        curvature = filled.diag() - (shares.T @ shares).double()
        # Keep the system solvable: a constant on all prices is free, and a cluster that no point hesitates about has no curvature.
        curvature += size / clusters + 1e-3 * size * torch.eye(clusters, dtype=torch.float64)
        step = torch.linalg.solve(curvature, gradient)
        slope = gradient @ step
        for _ in range(6):
            shares = (logits - (prices + step).float()).softmax(dim=1)
            # Along a line the slope of a concave function only falls: where it has not turned, the step was not too long.
            if (shares.sum(dim=0).double() - size) @ step >= -0.5 * slope:
                break
            step, slope = step / 4, slope / 4
        prices = prices + step
    return prices, misplaced


class _Moves:
    """Successive shortest paths: move points between clusters until all have ``N // E`` or one more.

    Node ``j`` is a cluster, and ``moves[j, k]`` the extra cost of its cheapest point when that goes to ``k``. The last node
    is the pool of the ``N mod E`` places beyond ``N // E``: each cluster can hand it one point, at no cost. Prices keep
    ``moves[j, k] + prices[k] - prices[j] >= 0``, which says that nothing can be had cheaper with the sizes as they are.
    """

    def __init__(self, cost: Array, prices: Array, precision: float) -> None:
        points, clusters = cost.shape
        self.cost = cost
        self.labels: Indices = (cost + prices).argmin(axis=1)
        # Costs as close as this are taken as equal: one round then moves all points that tie, and all of them together
        # add less than their own rounding to the total.
        self.tolerance = precision * cost[np.arange(points), self.labels].mean()
        self.size, extra = divmod(points, clusters)
        # The pool's price is that of the first cluster that gets no extra place.
        pool = np.sort(prices)[::-1][extra]
        self.prices = np.append(prices, pool)
        self.handed = prices > pool
        self.surplus = np.bincount(self.labels, minlength=clusters + 1) - self.size
        self.surplus[:clusters] -= self.handed
        self.surplus[clusters] = self.handed.sum() - extra
        self.moves = np.full((clusters + 1, clusters + 1), np.inf)
        for cluster in range(clusters):
            self._weigh(cluster)

    def balance(self) -> None:
        """Move at least one point of surplus to where points are missing, again and again until none is left."""
        while (self.surplus > 0).any():
            path = self._shortest_path()
            edges = list(pairwise(path))
            movers = [self._movers(source, target) for source, target in edges]
            amount = min(self.surplus[path[0]], -self.surplus[path[-1]], *(len(found) for found in movers))
            for (source, target), found in zip(edges, movers, strict=True):
                self._move(found[:amount], source, target)
            self.surplus[path[0]] -= amount
            self.surplus[path[-1]] += amount
            for node in path:
                self._weigh(node)

    def _shortest_path(self) -> list[int]:
        """Return the nodes from one with a surplus to the nearest that lacks points, and raise the prices on the way to it."""
        # Rounding, and movers that only nearly tie, leave a reduced cost slightly below zero.
        reduced = np.maximum(self.moves + self.prices - self.prices[:, None], 0.0)
        distance = np.where(self.surplus > 0, 0.0, np.inf)
        before = np.full(len(distance), -1)
        while True:  # Bellman-Ford, all edges at once
            through = distance[:, None] + reduced
            nearest = through.argmin(axis=0)
            found = through[nearest, np.arange(len(distance))]
            better = found < distance
            if not better.any():
                break
            distance[better], before[better] = found[better], nearest[better]
        lacking = np.flatnonzero(self.surplus < 0)
        node = int(lacking[distance[lacking].argmin()])
        self.prices += np.maximum(distance[node] - distance, 0.0)
        path = [node]
        while before[path[-1]] >= 0:
            path.append(int(before[path[-1]]))
        return path[::-1]

    def _movers(self, source: int, target: int) -> Indices:
        """Return the points whose move costs no more than the cheapest, up to the tolerance; to or from the pool just one."""
        pool = len(self.surplus) - 1
        if pool in {source, target}:
            return np.array([source if target == pool else target])
        members = np.flatnonzero(self.labels == source)
        extra = self.cost[members, target] - self.cost[members, source]
        order = extra.argsort(kind="stable")
        within = int((extra <= self.moves[source, target] + self.tolerance).sum())
        found: Indices = members[order[:within]]
        return found

    def _move(self, movers: Indices, source: int, target: int) -> None:
        pool = len(self.surplus) - 1
        if pool in {source, target}:
            self.handed[movers] = target == pool
        else:
            self.labels[movers] = target

    def _weigh(self, node: int) -> None:
        """Renew the costs of the moves out of ``node``, and those between it and the pool."""
        pool = len(self.surplus) - 1
        if node == pool:
            return
        members = np.flatnonzero(self.labels == node)
        if len(members):
            rows = self.cost[members]
            self.moves[node, :pool] = (rows - rows[:, node : node + 1]).min(axis=0)
        else:
            self.moves[node, :pool] = np.inf
        self.moves[node, pool] = np.inf if self.handed[node] else 0.0
        self.moves[pool, node] = 0.0 if self.handed[node] else np.inf
