"""Device-level balance against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.trainers.losses.base import make_losses

T, E, K = 9, 6, 2


@pytest.mark.parametrize("devices", [1, 2, 3, 6])
def test_formula(devices: int, record: Any) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    size, expected = E // devices, 0.0
    p = [[float(z.exp() / row.exp().sum()) for z in row] for row in logits]
    for j in range(devices):
        f, mean = 0.0, 0.0
        for i in range(j * size, (j + 1) * size):
            times = sum(sorted(p[t], reverse=True).index(p[t][i]) < K for t in range(T))
            f += E / (K * T) * times / size
            mean += sum(p[t][i] for t in range(T)) / T
        expected += f * mean
    loss = make_losses({"device_balance": {"coefficient": 1.0, "devices": devices}})[0]
    assert loss([record(logits, K)]).item() == pytest.approx(expected, rel=1e-13)


def test_imbalance_within_a_group_costs_nothing(record: Any) -> None:
    logits = torch.tensor([[40.0, 0, 0, 0], [0, 0, 0, 40.0]] * 3, dtype=torch.float64)
    loss = make_losses({"device_balance": {"coefficient": 1.0, "devices": 2}})[0]
    assert loss([record(logits, 1)]).item() == pytest.approx(1.0, rel=1e-14)


def test_groups_of_unequal_size_are_refused(record: Any) -> None:
    with pytest.raises(UsageError, match="4 does not divide 6 experts"):
        make_losses({"device_balance": {"devices": 4}})[0]([record(torch.randn(T, E))])
