"""Learning rates that would undo what conversion taught the routers are found, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from upcycle.trainers.optimizing.parameter_groups import parts, select
from upcycle.trainers.optimizing.router_rates import fitted_routers
from upcycle.trainers.recipe.part_recipes import GroupParameters


def taught(folder: Path, router: str | None) -> Path:
    record = {"format": 1, "router": router and {"name": router}}
    (folder / "upcycle.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.fixture
def cooled(stock: Callable[..., Any]) -> Any:
    model = stock("mixtral")
    belongs = parts(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if belongs[name] == "router":
                parameter.fill_(-3e-5)
    select(model, ["all"])
    return model


def test_routers_that_would_be_undone_get_a_factor_with_which_they_are_not(cooled: Any, tmp_path: Path) -> None:
    origin = taught(tmp_path, "ridge")
    found = fitted_routers(cooled, GroupParameters(learning_rate=1e-4), origin)
    assert found
    assert found.size == pytest.approx(3e-5)
    assert found.factor == 0.001
    assert "weights of about 3e-05" in found.spared(found.factor)
    assert "rates: {router: 0.001}" in found.warning(1e-4)
    assert fitted_routers(cooled, GroupParameters(learning_rate=1e-4, router=found.factor), origin) is None


def test_no_factor_where_no_calibrated_router_is_lost(cooled: Any, tmp_path: Path, stock: Callable[..., Any]) -> None:
    fast = GroupParameters(learning_rate=1e-3)
    assert fitted_routers(cooled, fast, tmp_path) is None, "no conversion"
    assert fitted_routers(cooled, fast, taught(tmp_path, "cool")) is None
    assert fitted_routers(cooled, fast, taught(tmp_path, None)) is None, "a growth step has no router of its own"
    origin = taught(tmp_path, "centroid")
    assert fitted_routers(cooled, fast, origin)
    select(cooled, ["experts", "rest"])
    assert fitted_routers(cooled, fast, origin) is None
    usual = stock("mixtral")  # weights of 0.02 and more
    select(usual, ["all"])
    assert fitted_routers(usual, fast, origin) is None
