"""The z-loss against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from upcycle.trainers.losses.base import make_losses


def test_formula(record: Any) -> None:
    logits = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in logits.tolist()) / 7
    loss = make_losses({"router_z": {"coefficient": 1.0}})[0]
    assert loss([record(logits)]).item() == pytest.approx(expected, rel=1e-13)
    assert loss([record(logits - logits.logsumexp(-1, keepdim=True))]).item() == pytest.approx(0, abs=1e-28)


def test_large_half_precision_logits_do_not_overflow(record: Any) -> None:
    logits = torch.full((3, 4), 300.0, dtype=torch.float16)
    value = make_losses({"router_z": {"coefficient": 1.0}})[0]([record(logits)])
    assert value.item() == pytest.approx((300 + math.log(4)) ** 2, rel=1e-6)
