"""The norm of a step's gradient."""

from __future__ import annotations

import pytest
import torch

from upcycle.trainers.run.step import gradient_norm


def test_the_gradients_norm_does_not_drift_with_size() -> None:
    """A constant tensor, whose norm is known; fp32 sums of it are off by percents, and infinite ones stay infinite."""
    elements = 30_000_001
    value = torch.full((elements,), 1e-3)
    exact = elements**0.5 * value[0].double().item()
    assert float(gradient_norm([value])) == pytest.approx(exact, rel=1e-7)
    assert float(gradient_norm([value[:20_000_000].view(1000, -1), value[20_000_000:]])) == pytest.approx(
        exact, rel=1e-7
    )
    assert float(gradient_norm([value.bfloat16()[:4], torch.zeros(0)])) == pytest.approx(2e-3, rel=1e-2)
    assert not torch.isfinite(gradient_norm([torch.tensor([1.0, float("inf")])]))
    assert float(gradient_norm([])) == 0
