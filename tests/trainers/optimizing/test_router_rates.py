"""Learning rates that would undo what conversion taught the routers are warned of, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from upcycle.trainers.optimizing.parameter_groups import parts, select
from upcycle.trainers.optimizing.router_rates import router_warning
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


def test_a_rate_that_undoes_calibrated_routers_is_warned_of_and_the_suggested_one_is_not(
    cooled: Any, tmp_path: Path
) -> None:
    origin = taught(tmp_path, "ridge")
    warning = router_warning(cooled, GroupParameters(learning_rate=1e-4), origin)
    assert warning
    assert "weights are about 3e-05" in warning
    assert "up to 0.0001" in warning
    assert "'ridge'" in warning
    assert "rates: {router: 0.001}" in warning
    assert router_warning(cooled, GroupParameters(learning_rate=1e-4, router=0.001), origin) is None


def test_no_warning_where_no_calibrated_router_is_lost(cooled: Any, tmp_path: Path, stock: Callable[..., Any]) -> None:
    fast = GroupParameters(learning_rate=1e-3)
    assert router_warning(cooled, fast, tmp_path) is None, "no conversion"
    assert router_warning(cooled, fast, taught(tmp_path, "cool")) is None
    assert router_warning(cooled, fast, taught(tmp_path, None)) is None, "a growth step has no router of its own"
    origin = taught(tmp_path, "centroid")
    assert router_warning(cooled, fast, origin)
    select(cooled, ["experts", "rest"])
    assert router_warning(cooled, fast, origin) is None
    usual = stock("mixtral")  # weights of 0.02 and more
    select(usual, ["all"])
    assert router_warning(usual, fast, origin) is None
