"""The router row of an added expert, restated in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from upcycle.ffn.ridge_sums import STRENGTHS, RidgeSums
from upcycle.routers.for_mixing.added_row import RowTokens, fit_row, row_weights

T, D, E = 240, 6, 4


@pytest.fixture
def tokens() -> RowTokens:
    """A third of the tokens is of the new kind, and lies elsewhere."""
    rng = torch.Generator().manual_seed(0)
    new = torch.arange(T) >= 160
    x = torch.randn(T, D, generator=rng) + new[:, None] * torch.tensor([1.5, 0.5, 0, 0, 0, 0])
    return RowTokens(x, new, torch.arange(T) // 10 % 8 == 7)


@pytest.fixture
def rows() -> torch.Tensor:
    """Those of the experts that are known."""
    return torch.randn(E, D, generator=torch.Generator().manual_seed(3))


def solved(x: np.ndarray, y: np.ndarray, weight: np.ndarray, strength: float) -> np.ndarray:
    """The least-squares problem itself: rows times the root of their weight, and the ridge as further rows."""
    root = np.sqrt(weight)[:, None]
    ridge = np.sqrt(strength * (weight @ x**2).mean()) * np.eye(x.shape[1])
    return np.linalg.lstsq(
        np.vstack([root * x, ridge]), np.concatenate([root[:, 0] * y, np.zeros(x.shape[1])]), rcond=None
    )[0]


def test_both_kinds_of_text_count_the_same(tokens: RowTokens) -> None:
    weights = row_weights(tokens.new)
    assert weights[tokens.new].sum() == pytest.approx(T / 2)
    assert weights[~tokens.new].sum() == pytest.approx(T / 2)


@pytest.mark.parametrize("sharpness", [1.0, 2.5])
def test_the_row_is_the_solution_from_scratch(sharpness: float, tokens: RowTokens, rows: torch.Tensor) -> None:
    """Of the strength whose fit to the other tokens does best on those held out; the unit is a mean over the other text."""
    x, held, new = tokens.x.double().numpy(), tokens.held.numpy(), tokens.new.numpy()
    y, weight = np.where(new, 1.0, -1 / E), row_weights(tokens.new).numpy()
    losses = {}
    for strength in STRENGTHS:
        row = solved(x[~held], y[~held], weight[~held], strength)
        losses[strength] = (weight[held] * (x[held] @ row - y[held]) ** 2).sum()
    best = min(losses, key=lambda strength: losses[strength])
    logits = [row @ rows.double().numpy().T for row in x[~new]]
    unit = np.mean([max(row) - sum(row) / E for row in logits]) / (1 - 1 / E)
    made = fit_row(tokens, rows, sharpness)
    assert made.strength == best
    assert made.unit == pytest.approx(unit, rel=1e-9)
    expected = rows.double().numpy().mean(0) + sharpness * unit * solved(x, y, weight, best)
    np.testing.assert_allclose(made.row.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_it_lies_where_all_domains_at_once_would_put_it(tokens: RowTokens) -> None:
    """DUME from scratch: one-hot labels of all E + 1 domains, one solution; and the same, grown from one of the E alone."""
    x, new, weight = tokens.x.double().numpy(), tokens.new.numpy(), row_weights(tokens.new).numpy()
    domain = np.where(new, E, np.arange(T) % E)
    x = x + np.eye(E + 1, D)[domain]
    some = tokens._replace(x=torch.from_numpy(x))
    first = np.stack([solved(x[~new], 1.0 * (domain[~new] == e) - 1 / E, weight[~new], 1e-3) for e in range(E)])
    made = fit_row(some, torch.from_numpy(first))
    every = np.stack([solved(x, 1.0 * (domain == e), weight, made.strength) for e in range(E + 1)])
    found = (made.row.numpy() - first.mean(0)) / made.unit
    np.testing.assert_allclose(found, every[E] - every[:E].mean(0), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rows", [torch.zeros(E, D), torch.ones(1, D)])
def test_a_router_without_differences_has_the_labels_unit(rows: torch.Tensor, tokens: RowTokens) -> None:
    assert fit_row(tokens, rows).unit == 1


def test_sums_of_the_old_text_are_enough_to_add_to() -> None:
    """DUME's increment: the old text's sums, and those of the new text added later, give the solution of all tokens at once."""
    rng = torch.Generator().manual_seed(1)
    x, y, ones = torch.randn(T, D, generator=rng), torch.randn(T, 1, generator=rng), torch.ones(T)
    together, later = RidgeSums(D, 1), RidgeSums(D, 1)
    together.add(x, y, ones)
    later.add(x[:160], y[:160], ones[:160])
    first = later.solve(1e-3).weights
    later.add(x[160:], y[160:], ones[160:])
    scratch = together.solve(1e-3).weights
    torch.testing.assert_close(later.solve(1e-3).weights, scratch, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(first, scratch, rtol=1e-2)
    np.testing.assert_allclose(
        scratch[:, 0].numpy(), solved(x.double().numpy(), y[:, 0].double().numpy(), np.ones(T), 1e-3), rtol=1e-9
    )
