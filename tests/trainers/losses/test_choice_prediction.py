"""The loss that teaches routers to predict expert choice: its formula in fp64, what it reaches, and what it is refused for."""

from __future__ import annotations

import math

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.models.own.routing.causal_choice import CausalChoiceRule, ChoiceCorrection
from upcycle.trainers.losses.base import make_losses
from upcycle.trainers.routing.choosing_experts import chosen_by_experts
from upcycle.trainers.routing.router_records import RouterRecord
from upcycle.trainers.routing.varying_rules import varying_rule

B, S, E, FACTOR = 2, 7, 4, 1.5
RULE = varying_rule(CausalChoiceRule(FACTOR), E)
assert RULE


def draw(seed: int) -> torch.Tensor:
    return torch.randn(B * S, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def record(z: torch.Tensor, correction: torch.Tensor | None, real: torch.Tensor | None = None) -> RouterRecord:
    """As a pass over B rows would record it."""
    assert RULE
    real = torch.ones(B, S, dtype=torch.bool) if real is None else real
    return RouterRecord(0, z, *chosen_by_experts(RULE, z, real), RULE, correction=correction)


def test_formula() -> None:
    """Row by row: each expert takes its best real tokens; then the mean cross-entropy of what was predicted of them."""
    z, correction = draw(1), draw(2)
    real = torch.ones(B, S, dtype=torch.bool)
    real[1, 5:] = False
    total, count = 0.0, 0
    for row in range(B):
        there = [row * S + place for place in range(S) if real[row, place]]
        p = {t: [math.exp(one) / sum(map(math.exp, z[t].tolist())) for one in z[t].tolist()] for t in there}
        for e in range(E):
            best = sorted(there, key=lambda t: -p[t][e])[: math.ceil(len(there) * FACTOR / E)]
            for t in there:
                odds = math.log(E * p[t][e]) + float(correction[t, e])
                chance = 1 / (1 + math.exp(-odds))
                total -= math.log(chance if t in best else 1 - chance) / E
        count += len(there)
    (loss,) = make_losses({"choice_prediction": {"coefficient": 0.25}})
    found = loss([record(z, correction, real)], real)
    torch.testing.assert_close(found, torch.tensor(0.25 * total / count, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_router_itself_gets_no_gradient() -> None:
    z, correction = draw(3).requires_grad_(), draw(4).requires_grad_()
    (loss,) = make_losses({"choice_prediction": {}})
    got, of_router = torch.autograd.grad(loss([record(z, correction)]), (correction, z), allow_unused=True)
    assert got.abs().min() > 0
    assert of_router is None
    x = torch.randn(B * S, 5, requires_grad=True)
    predictor = ChoiceCorrection(E, 5)
    with torch.no_grad():
        predictor.weight.fill_(1.0)
    found = loss([record(draw(3), predictor(x))])
    weight, of_token = torch.autograd.grad(found, (predictor.weight, x), allow_unused=True)
    assert weight.abs().max() > 0
    assert of_token is None


def test_without_expert_choice_there_is_nothing_to_predict() -> None:
    (loss,) = make_losses({"choice_prediction": {}})
    with pytest.raises(UsageError, match="here experts do not choose"):
        loss([record(draw(5), None)])
