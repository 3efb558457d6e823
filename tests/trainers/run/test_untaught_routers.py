"""Training a MoE whose chosen experts weigh the same whatever the router says (phimoe)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import losses, recipe_for, run

import upcycle
from upcycle.errors import UsageError

Pico = Callable[[str], Path]


@pytest.fixture
def moe(pico: Pico, tmp_path: Path) -> Path:
    """Of an FFN without a gate and with biases."""
    upcycle.convert(str(pico("jais2")), tmp_path / "moe", experts=4, top_k=2, verification={"enabled": False})
    return tmp_path / "moe"


@pytest.mark.long
def test_experts_learn_and_the_run_says_that_routers_do_not(moe: Path, tmp_path: Path) -> None:
    recipe = recipe_for(moe, tmp_path / "all")
    _, said = run(recipe)
    assert any("no gradient of the loss on tokens reaches the routers" in text for text in said)
    found = losses(recipe)
    assert found[-1] < found[0]
    _, said = run(recipe_for(moe, tmp_path / "some", stage={"train": ["experts", "rest"], "losses": {}}))
    assert not any("no gradient of the loss on tokens" in text for text in said)


def test_targets_of_experts_are_refused(pico: Pico, moe: Path, tmp_path: Path) -> None:
    stage = {"losses": {}, "distillation": {"parent": str(pico("jais2")), "output_norms": 1.0, "expert_scale": 4.0}}
    with pytest.raises(UsageError, match="output_norms compares experts with pieces of the parent's FFN") as caught:
        run(recipe_for(moe, tmp_path / "run", stage=stage))
    assert "another target" in str(caught.value.hint)
