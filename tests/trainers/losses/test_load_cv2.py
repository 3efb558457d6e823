"""Load against Shazeer's formula, and its probability against drawing the noise many times."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch

from upcycle.trainers.losses.base import make_losses
from upcycle.trainers.routing.router_control import Noise
from upcycle.trainers.routing.router_records import RouterRecord
from upcycle.trainers.routing.routing_rule import RoutingRule

T, E, K = 7, 5, 2


def loss(**parameters: Any) -> Any:
    return make_losses({"load_cv2": {"coefficient": 1.0, **parameters}})[0]


@pytest.fixture
def noisy() -> RouterRecord:
    rng = torch.Generator().manual_seed(4)
    logits = torch.randn(T, E, dtype=torch.float64, generator=rng)
    std = 0.3 + torch.rand(T, E, dtype=torch.float64, generator=rng)
    noise = Noise(torch.randn(T, E, dtype=torch.float64, generator=rng) * std, std)
    rule = RoutingRule("softmax", E, K)
    return RouterRecord(0, logits, *rule.route(logits + noise.added), rule, noise)


def chance(record: Any, t: int, i: int) -> float:
    noisy = (record.logits + record.noise.added)[t].tolist()
    threshold = sorted((noisy[j] for j in range(E) if j != i), reverse=True)[K - 1]
    x = (record.logits[t, i].item() - threshold) / record.noise.std[t, i].item()
    return 0.5 * math.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize("unbiased", [True, False])
def test_formula(unbiased: bool, noisy: Any) -> None:
    load = [sum(chance(noisy, t, i) for t in range(T)) for i in range(E)]
    variance = statistics.variance(load) if unbiased else statistics.pvariance(load)
    expected = variance / statistics.mean(load) ** 2
    assert loss(unbiased=unbiased)([noisy]).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("t", range(T))
def test_the_chance_is_how_often_the_expert_would_be_chosen(noisy: Any, t: int) -> None:
    """The loss's own number for one token, against drawing one expert's noise again and choosing anew."""
    draws = 20_000
    alone = Noise(noisy.noise.added[t : t + 1], noisy.noise.std[t : t + 1])
    chances = loss().sums(replace(noisy, logits=noisy.logits[t : t + 1], noise=alone), None)
    rng = torch.Generator().manual_seed(6 + t)
    for i in range(E):
        again = (noisy.logits + noisy.noise.added)[t].repeat(draws, 1)
        fresh = torch.randn(draws, dtype=torch.float64, generator=rng)
        again[:, i] = noisy.logits[t, i] + fresh * noisy.noise.std[t, i]
        rate = (again.topk(K).indices == i).any(1).double().mean().item()
        # Standard errors of a rate are at most half the root of 1 / draws; five are exceeded once in 1.7 million.
        assert rate == pytest.approx(chances[i].item(), abs=5 * 0.5 / draws**0.5)


def test_without_noise_loads_are_counts(record: Any) -> None:
    plain = record(torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), K)
    counts = [sum(i in row for row in plain.experts.tolist()) for i in range(E)]
    expected = statistics.variance(counts) / statistics.mean(counts) ** 2
    assert loss()([plain]).item() == pytest.approx(expected, rel=1e-13)


def test_all_experts_active_is_balanced(record: Any) -> None:
    logits = torch.randn(T, 3, dtype=torch.float64)
    noise = Noise(torch.randn_like(logits), torch.ones_like(logits))
    assert loss()([record(logits, 3, noise=noise)]).item() == 0
