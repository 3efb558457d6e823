"""MoEC's variance loss against its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.trainers.losses.base import make_losses

T, E, K = 9, 6, 2


@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("clusters", [1, 2, 3, 6])
def test_formula(clusters: int, relaxed: bool, record: Any) -> None:
    logits = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    p = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits.tolist()]
    mean = [sum(row[i] for row in p) / T for i in range(E)]
    size, variances, means = E // clusters, [], []
    for g in range(clusters):
        own = mean[g * size : (g + 1) * size]
        means.append(sum(own) / size)
        variances.append(sum((one - means[-1]) ** 2 for one in own) / size)
    expected = E * sum(variances) / clusters
    if relaxed and clusters > 1:
        first, second = sorted(means, reverse=True)[:2]
        expected /= math.exp(first - second)
    loss = make_losses({"cluster_variance": {"coefficient": 1.0, "clusters": clusters, "relaxed": relaxed}})[0]
    assert loss([record(logits, K)]).item() == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_clusters_may_differ_as_long_as_their_experts_do_not(record: Any) -> None:
    logits = torch.tensor([[3.0, 3.0, -1.0, -1.0]] * 3, dtype=torch.float64)
    loss = make_losses({"cluster_variance": {"coefficient": 1.0, "clusters": 2}})[0]
    assert loss([record(logits, 1)]).item() == pytest.approx(0.0, abs=1e-16)
    other = make_losses({"cluster_variance": {"coefficient": 1.0, "clusters": 1}})[0]
    assert other([record(logits, 1)]).item() > 0.1


def test_clusters_of_unequal_size_are_refused(record: Any) -> None:
    with pytest.raises(UsageError, match="4 does not divide 6 experts"):
        make_losses({"cluster_variance": {"clusters": 4}})[0]([record(torch.randn(T, E))])
