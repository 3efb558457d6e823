"""Skywork's loss against its formula, and its coefficients against the paper's rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.trainers.losses.base import make_losses

T, E, K = 8, 4, 2


def test_formula(record: Any) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = 0.0
    for j in range(E):
        mean = sum(float(row[j].exp() / row.exp().sum()) for row in logits) / T
        expected += (1 / E - mean) ** 2
    loss = make_losses({"skywork_balance": {"coefficient": 1.0}})[0]
    assert loss([record(logits, K)]).item() == pytest.approx(expected, rel=1e-12)


def test_every_layers_coefficient_follows_its_drop_rate(record: Any) -> None:
    loss = make_losses({"skywork_balance": {"adaptive": True, "coefficient": 0.002}})[0]
    logits = torch.randn(T, E)
    expected = {0: 0.002, 1: 0.002}
    for dropped in (3, 0, 5):
        for _ in range(2):  # two micro-batches of a step are observed together
            half_kept = torch.arange(T * K).view(T, K) >= dropped
            all_kept = torch.ones(T, K, dtype=torch.bool)
            loss([record(logits, K, layer=0, kept=half_kept), record(logits, K, layer=1, kept=all_kept)])
        for layer, rate in ((0, dropped / (T * K)), (1, 0.0)):
            assert loss.coefficient(layer) == pytest.approx(expected[layer], rel=1e-6)
            expected[layer] = 0.99 * expected[layer] + 0.01 * min(rate / 5, 0.01)
        loss.after_step()
    assert loss.coefficient(0) == pytest.approx(expected[0], rel=1e-6)
    assert loss.state() == {"0": loss.coefficient(0), "1": loss.coefficient(1)}


def test_masked_tokens_are_not_dropped_ones(record: Any) -> None:
    loss = make_losses({"skywork_balance": {"adaptive": True, "coefficient": 0.0, "inertia": 0.0, "largest": 1.0}})[0]
    kept = torch.ones(T, K, dtype=torch.bool)
    kept[0] = kept[1, 0] = False
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 0] = False
    loss([record(torch.randn(T, E), K, kept=kept)], mask)
    loss.after_step()
    assert loss.coefficient(0) == pytest.approx(0.2 * 1 / (7 * K), rel=1e-6)


def test_nothing_to_adapt_to_is_refused(record: Any) -> None:
    with pytest.raises(UsageError, match="without a capacity") as caught:
        make_losses({"skywork_balance": {"adaptive": True}})[0]([record(torch.randn(T, E))])
    assert "capacity_factor" in str(caught.value.hint)
