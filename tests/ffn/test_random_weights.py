"""Re-initialised weights have the moments of what they replace, noise those it was asked for; the statistics are taken here again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from upcycle.ffn.blueprint import Draws
from upcycle.ffn.random_weights import redrawn, stream

ROWS, D = 64, 96


@pytest.fixture
def weight() -> torch.Tensor:
    """Rows that are narrow about 5, and rows that are wide about -3: whose moments were taken cannot be mistaken."""
    rng = torch.Generator().manual_seed(7)
    narrow = 5 + 0.1 * torch.randn(ROWS // 2, D, generator=rng)
    wide = -3 + 2 * torch.randn(ROWS // 2, D, generator=rng)
    return torch.cat([narrow, wide])


def numbers(tensor: torch.Tensor) -> Any:
    return tensor.double().numpy().flatten()


def is_normal(values: Any, mean: float, deviation: float) -> bool:
    """Within four standard errors, and of that shape."""
    near = abs(values.mean() - mean) < 4 * deviation / np.sqrt(values.size)
    as_wide = abs(values.std() / deviation - 1) < 4 / np.sqrt(2 * values.size)
    return bool(near and as_wide and kstest((values - mean) / deviation, "norm").pvalue > 1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_new_rows_have_the_moments_of_those_they_replace(first: bool, weight: torch.Tensor) -> None:
    fresh = torch.zeros(ROWS, dtype=torch.bool)
    fresh[: ROWS // 2] = first
    fresh[ROWS // 2 :] = not first
    found = redrawn(weight, fresh, Draws(3), 0.0, 0.0, "routed", 0, "gate")
    assert torch.equal(found[~fresh], weight[~fresh])
    old = numbers(weight[fresh])
    assert is_normal(numbers(found[fresh]), old.mean(), old.std())
    shuffled = abs(np.corrcoef(np.sort(numbers(found[fresh])), np.sort(old))[0, 1]) == 1.0
    assert not shuffled  # drawn, not what was there in another order


def test_the_initializers_rows_have_its_deviation(weight: torch.Tensor) -> None:
    fresh = torch.ones(ROWS, dtype=torch.bool)
    assert is_normal(numbers(redrawn(weight, fresh, Draws(3, "initializer", 0.02), 0.0, 0.0, "up")), 0.0, 0.02)


@pytest.mark.parametrize(("relative", "absolute"), [(0.25, 0.0), (0.0, 0.3), (0.25, 0.3)])
def test_noise_is_relative_to_the_matrix_as_it_was_and_variances_add_up(
    relative: float, absolute: float, weight: torch.Tensor
) -> None:
    deviation = np.hypot(relative * numbers(weight).std(), absolute)
    found = redrawn(weight, None, Draws(3), relative, absolute, "routed", 0, "gate")
    assert is_normal(numbers(found) - numbers(weight), 0.0, deviation)
    fresh = torch.arange(ROWS) < ROWS // 2
    both = redrawn(weight, fresh, Draws(3), relative, absolute, "routed", 0, "gate")
    assert is_normal(numbers(both[~fresh]) - numbers(weight[~fresh]), 0.0, deviation)
    assert is_normal(
        numbers(both[fresh]), numbers(weight[fresh]).mean(), np.hypot(deviation, numbers(weight[fresh]).std())
    )


def test_every_name_and_every_seed_has_numbers_of_its_own() -> None:
    names = [(0, "a"), (1, "a"), (0, "b"), (0, "a", "b"), (0, "a/c"), (0, 1, "a"), (0, 11)]
    drawn = torch.stack([torch.randn(500, generator=stream(*name)) for name in names]).numpy()
    assert np.abs(np.corrcoef(drawn) - np.eye(len(names))).max() < 5 / np.sqrt(500)
    again = torch.stack([torch.randn(500, generator=stream(*name)) for name in reversed(names)]).numpy()
    assert np.array_equal(again[::-1], drawn)  # whatever was drawn before
