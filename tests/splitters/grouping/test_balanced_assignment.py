"""The balanced assignment against scipy's optimum for the same problem, written out as one column per place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from upcycle.errors import UsageError
from upcycle.splitters.grouping import balanced_assignment as module
from upcycle.splitters.grouping.balanced_assignment import balanced_assignment

Costs = NDArray[np.float64]
FORBIDDEN = 1e7
SHAPES = [(1, 1), (9, 1), (40, 40), (60, 47), (599, 16), (600, 8), (600, 7)]


def optimum(cost: Costs) -> float:
    """``N // E`` places per cluster and one more; points that are not there take what is left, but no first places."""
    points, clusters = cost.shape
    size, extra = divmod(points, clusters)
    places = np.repeat(cost[:, :, None], size + 1, axis=2)
    absent = np.zeros((clusters - extra, clusters, size + 1))
    absent[:, :, :size] = FORBIDDEN
    square = np.concatenate([places, absent]).reshape(-1, clusters * (size + 1))
    rows, columns = linear_sum_assignment(square)
    total = square[rows, columns].sum()
    assert total < FORBIDDEN
    return float(total)


def clustered(points: int, clusters: int, rng: np.random.Generator) -> Costs:
    """Squared distances to some of the points, which lie in three heaps of very different size."""
    x = rng.standard_normal((3, 5))[rng.choice(3, points, p=[0.8, 0.1, 0.1])] + 0.1 * rng.standard_normal((points, 5))
    centroids = x[rng.choice(points, clusters, replace=False)]
    return ((x[:, None] - centroids) ** 2).sum(axis=-1)  # type: ignore[no-any-return]


KINDS = {
    "random": lambda n, e, rng: rng.random((n, e)),
    "clustered": clustered,
    "whole numbers": lambda n, e, rng: rng.integers(0, 4, (n, e)).astype(float),
    "all the same": lambda n, e, rng: np.full((n, e), 3.0),
    "few distinct rows": lambda n, e, rng: rng.random((3, e))[rng.integers(0, 3, n)],
    "scales apart": lambda n, e, rng: rng.random((n, e)) ** 4 * np.exp(3 * rng.standard_normal(e)),
    "negative": lambda n, e, rng: -100 - rng.random((n, e)),
    "one favourite": lambda n, e, rng: rng.random((n, e)) + 5 * (np.arange(e) > 0),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_cheapest_of_all_balanced_assignments(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    cost = torch.from_numpy(KINDS[kind](*shape, np.random.default_rng(1))).to(dtype)
    labels, prices = balanced_assignment(cost)
    assert (labels.dtype, labels.shape) == (torch.int64, shape[:1])
    sizes = torch.bincount(labels, minlength=shape[1])
    assert len(sizes) == shape[1]
    assert sizes.max() - sizes.min() <= 1
    exact = cost.double()
    best = optimum(exact.numpy())
    # Rounding is all that may be lost: N sums, and as many points taken as equal to within 1 ulp of what they pay.
    ulps = shape[0] * torch.finfo(dtype).eps
    paid = exact.gather(1, labels[:, None]).sum().item()
    assert paid <= best + ulps * max(abs(best), 1e-12)
    # The prices prove it: nobody would rather be elsewhere.
    asked = exact + prices
    assert (asked.gather(1, labels[:, None])[:, 0] - asked.amin(dim=1)).max() <= ulps * asked.abs().max()


def test_a_price_is_worth_what_a_place_is() -> None:
    # Three want the first cluster, which takes two; the one that gives way for least asks for 1.
    cost = torch.tensor([[0.0, 5.0], [0.0, 1.0], [0.0, 3.0], [2.0, 0.0]])
    labels, prices = balanced_assignment(cost)
    assert labels.tolist() == [0, 1, 0, 1]
    assert 1 <= (prices[0] - prices[1]).item() <= 3


def test_prices_of_a_similar_problem_save_work_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    cost = torch.rand(2000, 8, generator=rng) + torch.rand(8, generator=rng)
    calls = []
    newton = module._newton
    monkeypatch.setattr(module, "_newton", lambda *args: calls.append(1) or newton(*args))
    labels, prices = balanced_assignment(cost)
    cold = len(calls)
    assert torch.equal(balanced_assignment(cost, prices=prices)[0], labels)
    assert len(calls) - cold < cold


@pytest.mark.parametrize("factor", [-1e6, 1e6])
def test_prices_of_another_problem_do_no_harm(factor: float) -> None:
    cost = torch.from_numpy(np.random.default_rng(2).random((600, 8)))
    labels, _ = balanced_assignment(cost, prices=torch.arange(8) * factor)
    assert cost.gather(1, labels[:, None]).sum().item() == pytest.approx(optimum(cost.numpy()), rel=1e-12)


def test_a_rough_one_is_nearly_balanced_and_costs_no_more() -> None:
    cost = torch.randn(2000, 8, generator=torch.Generator().manual_seed(3)).square()
    exact, _ = balanced_assignment(cost)
    rough, prices = balanced_assignment(cost, rough=True)
    assert torch.equal(rough, (cost + prices).argmin(dim=1))  # every point where it is cheapest: no sizes are forced
    # What the entropy leaves undecided: a point in a thousand misplaced, and _UNDECIDED of them per cluster.
    off = (torch.bincount(rough, minlength=8) - 250).abs().sum().item()
    assert 0 < off <= 2000 * 1e-3 + 8 * 8
    price = lambda labels: (cost + prices).gather(1, labels[:, None]).sum().item()  # noqa: E731
    assert price(rough) <= price(exact)


def test_the_same_every_time_and_the_threads_stay_as_they_were() -> None:
    cost = torch.randint(0, 3, (500, 6), generator=torch.Generator().manual_seed(3)).float()
    threads = torch.get_num_threads()
    first, second = balanced_assignment(cost), balanced_assignment(cost)
    assert torch.get_num_threads() == threads
    assert (torch.tensor(1e-39) * 0.5).item() > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("cost", "prices", "message"),
    [
        (torch.zeros(3), None, "points, clusters"),
        (torch.zeros(2, 3), None, "2 points cannot be assigned to 3 clusters"),
        (torch.zeros(2, 0), None, "0 clusters"),
        (torch.tensor([[0.0, float("nan")], [0.0, 1.0]]), None, "not finite"),
        (torch.zeros(2, 2), torch.zeros(3), "prices must be 2"),
        (torch.zeros(2, 2), torch.tensor([0.0, float("inf")]), "prices must be 2"),
    ],
)
def test_what_cannot_be_assigned_is_said(cost: torch.Tensor, prices: torch.Tensor | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        balanced_assignment(cost, prices=prices)
