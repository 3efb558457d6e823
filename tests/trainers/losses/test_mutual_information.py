"""Mutual information against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from upcycle.trainers.losses.base import make_losses

T, E = 8, 4


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p)


def test_formula(record: Any) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    p = [[float(z.exp() / row.exp().sum()) for z in row] for row in logits]
    mean = [sum(row[i] for row in p) / T for i in range(E)]
    expected = -entropy(mean) + sum(map(entropy, p)) / T
    loss = make_losses({"mutual_information": {"coefficient": 1.0}})[0]
    assert loss([record(logits)]).item() == pytest.approx(expected, rel=1e-12)
    assert -math.log(E) <= expected <= 0


def test_probabilities_that_underflow_have_a_finite_gradient(record: Any) -> None:
    logits = (torch.eye(E) * 1000).requires_grad_()
    value = make_losses({"mutual_information": {"coefficient": 1.0}})[0]([record(logits, 1)])
    assert value.item() == pytest.approx(-math.log(E), rel=1e-6)
    assert torch.autograd.grad(value, logits)[0].isfinite().all()
