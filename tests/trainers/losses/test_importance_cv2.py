"""Importance against its formula."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from upcycle.trainers.losses.base import make_losses

T, E, K = 9, 5, 2


@pytest.mark.parametrize("of", ["weights", "probabilities"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_formula(of: str, unbiased: bool, record: Any) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    importance = [0.0] * E
    for row in logits.tolist():
        exponentials = torch.tensor(row, dtype=torch.float64).exp().tolist()
        best = sorted(range(E), key=lambda i: -row[i])[: K if of == "weights" else E]
        for i in best:
            importance[i] += exponentials[i] / sum(exponentials[j] for j in best)
    variance = statistics.variance(importance) if unbiased else statistics.pvariance(importance)
    expected = variance / statistics.mean(importance) ** 2
    loss = make_losses({"importance_cv2": {"coefficient": 1.0, "of": of, "unbiased": unbiased}})[0]
    assert loss([record(logits, K)]).item() == pytest.approx(expected, rel=1e-12)


def test_a_single_expert_is_balanced(record: Any) -> None:
    assert make_losses({"importance_cv2": {}})[0]([record(torch.randn(T, 1), 1)]).item() == 0
