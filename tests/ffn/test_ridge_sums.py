"""The streamed ridge regression against numpy's least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from upcycle.errors import CheckpointError
from upcycle.ffn.ridge_sums import STRENGTHS, UNJUDGED_STRENGTH, RidgeSums, solve_ridge

T, M, N = 200, 12, 3


def data(tokens: int = T, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, M, generator=rng) * torch.logspace(-2, 1, M) + 1
    truth = torch.randn(M, N, generator=torch.Generator().manual_seed(9))
    return x, x @ truth + torch.randn(tokens, N, generator=rng), torch.rand(tokens, generator=rng) + 0.5


def by_lstsq(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, strength: float) -> np.ndarray:
    """Ridge as ordinary least squares with M more rows."""
    root = weight.double().sqrt()[:, None]
    x, y = x.double() * root, y.double() * root
    ridge = (strength * x.square().sum() / M).sqrt() * torch.eye(M, dtype=torch.float64)
    rows = torch.cat([x, ridge]), torch.cat([y, torch.zeros(M, N, dtype=torch.float64)])
    return np.linalg.lstsq(rows[0].numpy(), rows[1].numpy())[0]


def streamed(held_out: bool = True, products: torch.dtype = torch.float64) -> RidgeSums:
    sums = RidgeSums(M, N, products)
    for number, parts in enumerate(zip(*(part.split(30) for part in data()), strict=True)):
        sums.add(*parts, held_out=held_out and number % 3 == 2)
    return sums


def train_and_held_out() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    held = torch.arange(T) // 30 % 3 == 2
    return [part[~held] for part in data()], [part[held] for part in data()]


@pytest.mark.parametrize("strength", [0.0, 1e-6, 1e-2, 10.0])
def test_is_weighted_least_squares(strength: float) -> None:
    train, _ = train_and_held_out()
    # fp64 rounding, 1e-16, times the condition of the normal equations, at most 1e7 here.
    close = {"rtol": 0, "atol": 1e-8}
    np.testing.assert_allclose(streamed().solve(strength).weights, by_lstsq(*data(), strength), **close)
    np.testing.assert_allclose(
        streamed().solve(strength, everything=False).weights, by_lstsq(*train, strength), **close
    )


def test_fp32_products_are_nearly_as_good() -> None:
    exact, quick = (streamed(products=dtype).solve(1e-3).weights for dtype in (torch.float64, torch.float32))
    assert quick.dtype == torch.float64
    # fp32 rounding, 6e-8, times at most the condition, 1e3.
    assert torch.linalg.norm(quick - exact) < 6e-5 * torch.linalg.norm(exact)


def test_the_best_strength_has_the_least_held_out_error() -> None:
    train, (x, y, weight) = train_and_held_out()
    losses = {}
    for strength in STRENGTHS:
        error = y.double() - x.double() @ torch.from_numpy(by_lstsq(*train, strength))
        squares = [(weight[:, None] * part.double().square()).sum().item() for part in (error, y)]
        losses[strength] = squares[0] / squares[1]
    choice = streamed().best()
    assert choice.strength == min(losses, key=lambda strength: losses[strength])
    assert choice.held_out_loss == pytest.approx(losses[choice.strength], rel=1e-9)


def test_without_held_out_tokens_the_strength_is_a_fixed_one() -> None:
    assert streamed(held_out=False).best().strength == UNJUDGED_STRENGTH


def test_of_equal_strengths_the_strongest() -> None:
    sums = RidgeSums(M, N)
    for held_out in (False, True):
        sums.add(torch.randn(9, M), torch.zeros(9, N), torch.ones(9), held_out)
    assert sums.best((0.1, 1.0, 0.01)) == (1.0, 0.0)


@pytest.mark.parametrize("strength", [0.0, 1e-20, 1e-6])
def test_fewer_tokens_than_features(strength: float) -> None:
    x, y, weight = data(tokens=5)
    sums = RidgeSums(M, N)
    sums.add(x, y, weight)
    solution = sums.solve(strength)
    assert torch.isfinite(solution.weights).all()
    condition = sums.solve(strength, condition=True).condition
    assert condition is not None
    assert condition > 1e5
    # The tokens seen are fitted: nothing but the ridge stands against it.
    assert sums.loss(solution.weights) < 1e-4


def test_condition() -> None:
    x, _, weight = data()
    gram = (x * weight[:, None]).double().T @ x.double()
    matrix = gram + 0.01 * gram.diagonal().mean() * torch.eye(M)
    condition = solve_ridge(gram, torch.zeros(M, N), 0.01, condition=True).condition
    assert 0.9 * torch.linalg.cond(matrix) < condition < 1.001 * torch.linalg.cond(matrix)


def test_sums_that_are_not_finite_are_explained() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        solve_ridge(torch.full((M, M), torch.nan), torch.zeros(M, N), 0.1)
    with pytest.raises(CheckpointError, match="not finite"):
        solve_ridge(torch.eye(M), torch.full((M, N), torch.inf), 0.1)


def test_nothing_known_is_zero() -> None:
    solution = RidgeSums(M, N).solve(0.1, condition=True)
    assert not solution.weights.any()
    assert solution.condition == 1.0


def test_strengths_are_compared_on_few_targets_and_the_loss_is_that_of_all() -> None:
    rng = torch.Generator().manual_seed(5)
    sums, plain = RidgeSums(M, 300), []
    for number in range(12):
        x = torch.randn(30, M, generator=rng) * torch.logspace(-2, 1, M)
        y = x @ torch.randn(M, 300, generator=torch.Generator().manual_seed(9)) + torch.randn(30, 300, generator=rng)
        held_out = number % 3 == 2
        sums.add(x, y, torch.ones(30), held_out)
        plain.append((x.double(), y.double(), held_out))
    train = [torch.cat([part[i] for part in plain if not part[2]]) for i in (0, 1)]
    held = [torch.cat([part[i] for part in plain if part[2]]) for i in (0, 1)]
    losses = {}
    for strength in STRENGTHS:
        gram = train[0].T @ train[0]
        ridge = strength * gram.diagonal().mean() * torch.eye(M, dtype=torch.float64)
        weights = torch.linalg.solve(gram + ridge, train[0].T @ train[1])
        losses[strength] = ((held[1] - held[0] @ weights).square().sum() / held[1].square().sum()).item()
    choice = sums.best()
    assert choice.held_out_loss == pytest.approx(losses[choice.strength], rel=1e-9)
    # 64 combinations of 300 targets rank strengths almost as all do.
    assert losses[choice.strength] <= 1.01 * min(losses.values())


def test_what_is_subtracted_was_never_there() -> None:
    x, y, weight = data()
    start = torch.randn(M, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    before, directly = RidgeSums(M, N), RidgeSums(M, N)
    for held_out, part in ((False, slice(0, 150)), (True, slice(150, T))):
        before.add(x[part], y[part], weight[part], held_out)
        directly.add(x[part].double(), y[part].double() - x[part].double() @ start, weight[part], held_out)
    assert before.finite
    before.subtract(start)
    for strength in (1e-3, 1.0):
        np.testing.assert_allclose(before.solve(strength).weights, directly.solve(strength).weights, rtol=0, atol=1e-8)
    assert before.best().held_out_loss == pytest.approx(directly.best().held_out_loss, rel=1e-8)
