"""Domains in their shares, and Sheared-LLaMA's two rules against a restatement with loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from upcycle.errors import UsageError
from upcycle.trainers.data.domain_mixture import STRATUM, Mixture, updated_weights
from upcycle.trainers.recipe.data_recipe import DynamicWeights

WEIGHTS = {"book": 0.2, "code": 0.3, "web": 0.5}
REFERENCE = {"book": 1.9, "code": 0.7, "web": 1.7}
LOSSES = {"book": 2.4, "code": 0.65, "web": 1.9}


def paper(rate: float) -> dict[str, float]:
    found, total = {}, 0.0
    for name, weight in WEIGHTS.items():
        excess = LOSSES[name] - REFERENCE[name]
        if excess < 0:
            excess = 0.0
        found[name] = weight * math.exp(rate * excess)
        total += found[name]
    return {name: value / total for name, value in found.items()}


def code(rate: float, floor: float) -> dict[str, float]:
    logits = {name: math.log(WEIGHTS[name]) + rate * (LOSSES[name] - REFERENCE[name]) for name in WEIGHTS}
    total = sum(math.exp(value) for value in logits.values())
    found = {name: (1 - floor) * math.exp(value) / total + floor / 3 for name, value in logits.items()}
    return {name: value / sum(found.values()) for name, value in found.items()}


@pytest.mark.parametrize("rate", [1.0, 2.5])
def test_both_rules_equal_their_formulas(rate: float) -> None:
    found = updated_weights(WEIGHTS, LOSSES, REFERENCE, DynamicWeights(form="paper", rate=rate))
    assert found == pytest.approx(paper(rate), rel=1e-14)
    found = updated_weights(WEIGHTS, LOSSES, REFERENCE, DynamicWeights(form="code", rate=rate, floor=0.01))
    assert found == pytest.approx(code(rate, 0.01), rel=1e-14)
    assert sum(found.values()) == pytest.approx(1, abs=1e-15)


def test_the_rules_differ_where_a_domain_is_ahead() -> None:
    ahead = {**REFERENCE, "code": REFERENCE["code"] - 0.5}
    assert updated_weights(WEIGHTS, ahead, REFERENCE, DynamicWeights(form="paper")) == pytest.approx(WEIGHTS, rel=1e-14)
    assert updated_weights(WEIGHTS, ahead, REFERENCE, DynamicWeights(form="code"))["code"] < 0.21


def test_a_huge_excess_is_not_an_overflow() -> None:
    found = updated_weights(WEIGHTS, {**LOSSES, "web": 5000.0}, REFERENCE, DynamicWeights(form="code", floor=0.03))
    assert found == pytest.approx({"book": 0.01, "code": 0.01, "web": 0.98}, rel=1e-12)


def test_shares_are_met_within_every_stratum() -> None:
    mixture = Mixture(WEIGHTS, None, seed=1)
    for stratum in range(3):
        counts = np.bincount(mixture.draw(stratum * STRATUM, STRATUM), minlength=3)
        # One number lies in each 256th: a domain's count is off by less than one at either end of its interval.
        assert np.abs(counts - STRATUM * np.array([0.2, 0.3, 0.5])).max() < 2


def test_draws_depend_on_the_row_alone() -> None:
    mixture = Mixture(dict(reversed(WEIGHTS.items())), None, seed=1)
    whole = mixture.draw(0, 1000)
    assert np.concatenate([mixture.draw(at, 7) for at in range(0, 994, 7)]).tolist() == whole[:994].tolist()
    assert Mixture(WEIGHTS, None, seed=1).draw(300, 400).tolist() == whole[300:700].tolist()
    assert Mixture(WEIGHTS, None, seed=2).draw(0, 1000).tolist() != whole.tolist()


def test_static_weights_stay() -> None:
    assert Mixture(WEIGHTS, None, 0).observe(LOSSES) == WEIGHTS


def test_reference_losses_of_the_recipe_win() -> None:
    mixture = Mixture(WEIGHTS, DynamicWeights(reference=REFERENCE), 0)
    mixture.refer_to(LOSSES)
    assert mixture.reference == REFERENCE


def test_measured_reference_losses_and_weights_are_kept() -> None:
    """Whose they are is the run's to decide: test_reference_losses.py. They are measured once, and stay."""
    mixture = Mixture(WEIGHTS, DynamicWeights(), 0)
    with pytest.raises(UsageError, match="no reference losses"):
        mixture.observe(LOSSES)
    mixture.refer_to(REFERENCE)
    mixture.refer_to(LOSSES)
    assert mixture.observe(LOSSES) == pytest.approx(paper(1.0), rel=1e-14)
    again = Mixture(WEIGHTS, DynamicWeights(), 0)
    again.restore(mixture.state())
    assert again.state() == mixture.state()
    assert again.observe(LOSSES) == mixture.observe(LOSSES)


@pytest.mark.parametrize("losses", [{"book": 1.0, "code": 1.0}, {**LOSSES, "web": math.nan}])
def test_a_loss_that_is_missing_or_not_finite(losses: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"loss of domain 'web' is (None|nan)"):
        Mixture(WEIGHTS, DynamicWeights(reference=REFERENCE), 0).observe(losses)
