"""Posteriors of domains against Bayes' rule, token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from upcycle.methods.mixing.source_posteriors import largest, source_posteriors

S, N, T = 3, 5, 7


def random_likelihoods(scale: float = 0.3) -> torch.Tensor:
    return -scale * torch.rand(S, N, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def bayes(likelihoods: np.ndarray, prior: list[float], decay: float | None) -> list[float]:
    """Products of probabilities, as they are written down: fine for a few tokens."""
    now = [p / sum(prior) for p in prior]
    total, positions = [0.0] * S, 0
    for n in range(N):
        for t in range(T):
            joint = [now[j] * math.prod(math.exp(likelihoods[j, n, i]) for i in range(t)) for j in range(S)]
            posterior = [x / sum(joint) for x in joint]
            total = [a + b for a, b in zip(total, posterior, strict=True)]
            positions += 1
        if decay is not None:
            now = [decay * p + (1 - decay) * q for p, q in zip(now, posterior, strict=True)]
    return [x / positions for x in total]


@pytest.mark.parametrize("prior", [[1.0, 1.0, 1.0], [1.0, 2.0, 5.0]])
def test_against_bayes_rule(prior: list[float]) -> None:
    likelihoods = random_likelihoods()
    expected = bayes(likelihoods.numpy(), prior, None)
    # A few dozen operations of fp64 on numbers up to 1.
    assert np.allclose(source_posteriors(likelihoods, prior), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_the_cached_prior_follows_the_posteriors(decay: float) -> None:
    likelihoods = random_likelihoods(2.0)
    expected = bayes(likelihoods.numpy(), [1.0, 1.0, 2.0], decay)
    found = source_posteriors(likelihoods, [1.0, 1.0, 2.0], "cached", decay)
    assert np.allclose(found, expected, rtol=0, atol=1e-14)
    assert not np.allclose(found, source_posteriors(likelihoods, [1.0, 1.0, 2.0]), atol=1e-3)


def test_probabilities_far_below_the_smallest_number() -> None:
    likelihoods = torch.full((2, 1, 2001), -8.0, dtype=torch.float64)
    likelihoods[1] -= 0.5  # p(x | D=1) is exp(-17000): the product of the text's probabilities is no number
    found = source_posteriors(likelihoods, [1.0, 1.0])
    # sum_t 1 / (1 + exp(-t / 2)) over 2001 positions
    expected = sum(1 / (1 + math.exp(-t / 2)) for t in range(2001)) / 2001
    assert found[0].item() == pytest.approx(expected, rel=1e-13)
    cached = source_posteriors(likelihoods.repeat(1, 3, 1), [1.0, 1.0], "cached")
    assert cached.isfinite().all()
    assert cached[0] > found[0]


def test_the_first_position_knows_only_the_prior() -> None:
    assert source_posteriors(random_likelihoods()[:, :1, :1], [1.0, 3.0, 4.0]).tolist() == pytest.approx(
        [1 / 8, 3 / 8, 1 / 2]
    )


def test_the_largest_are_kept_and_sum_to_one() -> None:
    weights = torch.tensor([0.3, 0.1, 0.3, 0.3], dtype=torch.float64)
    assert largest(weights, 2).tolist() == [0.5, 0, 0.5, 0]
    assert largest(weights, None) is weights
    assert largest(weights, 9) is weights
