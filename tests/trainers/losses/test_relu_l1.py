"""ReMoE's loss, in loops, and how its coefficient moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.relu import ReluRule
from upcycle.models.own.routing.threshold import ThresholdRule
from upcycle.trainers.losses.base import make_losses
from upcycle.trainers.routing.router_records import RouterRecord
from upcycle.trainers.routing.varying_rules import varying_rule

T, E = 12, 5


def record(z: torch.Tensor, layer: int = 0, own: RouterRule | None = None) -> RouterRecord:
    rule = varying_rule(own or ReluRule(), E)
    assert rule
    return RouterRecord(layer, z, *rule.route(z), rule)


def draw(seed: int, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + mean


def test_it_is_the_papers_formula() -> None:
    """``(1 / L) sum_l (1 / T) sum_t sum_e f_le R(x)_te`` with ``f_le = (E / (k T)) #{t : R(x)_te > 0}``."""
    layers, k = [draw(1), draw(2)], 1.5
    expected = 0.0
    for z in layers:
        for t in range(T):
            for e in range(E):
                running = sum(1 for s in range(T) if z[s, e] > 0)
                expected += E / (k * T) * running * max(0.0, float(z[t, e])) / T / len(layers)
    (loss,) = make_losses({"relu_l1": {"coefficient": 0.25, "experts": k}})
    found = loss([record(z, layer) for layer, z in enumerate(layers)])
    torch.testing.assert_close(found, torch.tensor(0.25 * expected, dtype=torch.float64), rtol=1e-13, atol=0)


def test_no_gradient_flows_through_the_loads() -> None:
    z = draw(3).requires_grad_()
    (loss,) = make_losses({"relu_l1": {"coefficient": 1.0, "experts": 2.0}})
    (gradient,) = torch.autograd.grad(loss([record(z)]), z)
    with torch.no_grad():
        running = (z > 0).double()
        expected = running * (E / (2.0 * T) * running.sum(0) / T)
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=0)


def test_the_coefficient_follows_the_sparsity_of_all_layers() -> None:
    (loss,) = make_losses({"relu_l1": {"coefficient": 1e-3, "experts": 2.0, "factor": 1.2}})
    dense, sparse = draw(4, mean=3), draw(5, mean=-3)
    assert (dense > 0).sum() / T > 2 > (sparse > 0).sum() / T
    expected = 1e-3
    for layers in ([dense, dense], [dense, sparse], [sparse, sparse], [sparse, sparse]):
        loss([record(z, layer) for layer, z in enumerate(layers)])
        zeros = sum(int((z <= 0).sum()) for z in layers) / (len(layers) * T * E)
        expected *= 1.2 if zeros < 1 - 2 / E else 1 / 1.2
        loss.after_step()
        assert loss.coefficient(0) == loss.coefficient(1) == pytest.approx(expected, rel=1e-12)
    (other,) = make_losses({"relu_l1": {}})
    other.load_state(loss.state())
    assert other.coefficient(0) == loss.coefficient(0)
    loss.after_step()  # nothing was observed
    assert other.coefficient(0) == loss.coefficient(0)


@pytest.mark.parametrize(
    ("parameters", "own", "message"),
    [
        ({}, ThresholdRule(0.5), "this model's routers follow another rule"),
        ({"experts": 5.0}, ReluRule(), "5 experts per token of 5 leave nothing out"),
    ],
)
def test_what_cannot_become_sparse_is_refused(parameters: dict[str, Any], own: RouterRule, message: str) -> None:
    (loss,) = make_losses({"relu_l1": parameters})
    with pytest.raises(UsageError, match=message):
        loss([record(draw(6), own=own)])
