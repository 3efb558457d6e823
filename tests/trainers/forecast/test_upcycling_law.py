"""Rules that say when training from scratch is better."""

from __future__ import annotations

import pytest

from upcycle.trainers.forecast.upcycling_law import advice, crossing, loss_from_scratch, loss_upcycled


@pytest.mark.parametrize(
    ("parameters", "dense", "tokens", "scratch", "upcycled"),
    [  # table 2 of arXiv 2502.03009 put in by hand, in 40 digits
        (1e9, 7.4e10, 3.7e10, 2.144661, 2.144204),
        (7e9, 2e12, 1e11, 1.856879, 1.831264),
        (1.1e8, 1.6e10, 5e8, 3.040171, 2.811641),
    ],
)
def test_the_laws_of_the_paper(parameters: float, dense: float, tokens: float, scratch: float, upcycled: float) -> None:
    assert loss_from_scratch(tokens, parameters) == pytest.approx(scratch, abs=1e-6)
    assert loss_upcycled(dense, tokens, parameters) == pytest.approx(upcycled, abs=1e-6)


def test_the_longer_the_dense_training_the_less_a_token_gives() -> None:
    def gain(dense: float) -> float:
        return loss_upcycled(dense, 1e10, 1e9) / loss_upcycled(dense, 2e10, 1e9)

    assert gain(1e10) > gain(1e11) > gain(1e12)


def test_upcycling_is_ahead_until_the_crossing() -> None:
    for dense in (2e10, 2e11):
        limit = crossing(dense, 1e9)
        assert limit
        assert loss_upcycled(dense, limit / 2, 1e9) < loss_from_scratch(limit / 2, 1e9)
        assert loss_upcycled(dense, limit * 2, 1e9) > loss_from_scratch(limit * 2, 1e9)
    assert crossing(2e12, 1e9) is None


def test_skyworks_rule_compares_costs() -> None:
    """Twice what the dense model cost, in tokens times active parameters."""

    def warned(tokens: float) -> bool:
        return any("2406.06563" in warning for warning in advice(1e11, 1e9, tokens, 2e9))

    assert not warned(0.99e11)
    assert warned(1.0e11)
    assert "costs 4.0x" in advice(1e11, 1e9, 2e11, 2e9)[0]


def test_little_training_and_unknown_origins_are_not_warned_of() -> None:
    assert advice(2e12, 7e9, 1e9, 1.3e10) == []
    assert advice(None, 7e9, 1e15, 1.3e10) == []
    both = advice(1e10, 1e9, 1e12, 2e9)
    assert ["2406.06563" in both[0], "2502.03009" in both[1], len(both)] == [True, True, 2]
