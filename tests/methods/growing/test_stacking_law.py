"""Gstack's law of when to stack, against the paper's own examples and a restatement by powers."""

from __future__ import annotations

import pytest

import upcycle
from upcycle.methods.growing.stacking_law import tokens_before_stacking, when_to_stack


@pytest.mark.parametrize(
    ("parameters", "flops", "billions"),
    [(410e6, 4.9e19, 13), (7e9, 1.26e22, 21)],
    ids=["410M", "7B"],
)
def test_the_papers_examples(parameters: float, flops: float, billions: int) -> None:
    """The paper rounds to whole billions, and its coefficients to three digits: 0.005 in a power of ten is 1.2%."""
    assert tokens_before_stacking(parameters, flops) / 1e9 == pytest.approx(billions, abs=0.5 + 0.012 * billions)


def test_what_is_left_for_the_large_model() -> None:
    """7 B parameters of four times 1.75 B, 1.26e22 FLOPs: what the small model takes comes off those 300 B tokens."""
    said, warnings = when_to_stack(7e9, 1.75e9, 1.26e22)
    assert not warnings
    assert "stack after 20.5 B tokens" in said
    assert "train the large one on 295 B" in said  # 300 - 20.5 / 4
    said, warnings = when_to_stack(7e9, 1.75e9, 1e20)
    assert "gives no time" in said
    assert "by the law the small model alone would take" in warnings[0]


def test_the_plan_says_it() -> None:
    plan = upcycle.plan("demo", method="depth_stack", parameters={"growth": 2, "budget": 1e18})
    assert "stack after" in plan.summary
    assert any("extrapolation" in each for each in plan.warnings)
    assert "stack after" not in upcycle.plan("demo", method="depth_stack", parameters={"growth": 2}).summary
    wide = upcycle.plan("demo", method="depth_stack", parameters={"growth": 6})
    assert any("between 2 and 4" in each for each in wide.warnings)
