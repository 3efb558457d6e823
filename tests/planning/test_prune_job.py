"""How many neurons a pruning keeps, and which recipes say it wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import upcycle
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.errors import UsageError
from upcycle.planning.prune_job import kept_width
from upcycle.recipe.conversion_recipe import parse_recipe

Pico = Callable[[str], Path]


@pytest.mark.parametrize(
    ("size", "hidden", "active", "expected"),
    [
        (96, 32, 0.5, 48),
        (1536, 576, 0.5, 768),
        (1536, 576, 0.33, 512),  # 506.9 to the nearest multiple of 16
        (11008, 4096, 0.5, 5504),
        (11008, 4096, 0.75, 8256),
        (8192, 2048, 0.3, 2432),  # 2457.6: 38.4 steps of 64
        (8192, 1024, 0.001, 64),
        (8192, 1023, 0.001, 16),
    ],
)
def test_the_kept_part_is_rounded_to_a_width_hardware_has(
    size: int, hidden: int, active: float, expected: int, pico: Pico
) -> None:
    dense = replace(DenseCheckpoint.open(str(pico("llama"))).config, intermediate_size=size, hidden_size=hidden)
    recipe = parse_recipe({"source": "x", "method": "static_prune", "active": active}, "test")
    assert kept_width(recipe, dense) == expected


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({}, "neither is given", "--active 0.5, or --width N"),
        ({"active": 0.5, "width": 48}, "both are given", "--active 0.5, or --width N"),
        ({"width": 96}, "width 96 is not smaller than the FFNs, which have 96 neurons", "--width 88 or less"),
        ({"width": 4096}, "width 4096 is not smaller", "--width 88 or less"),
        ({"width": 45}, "width 45 is not a multiple of 8", "the nearest: --width 40 or --width 48"),
        ({"width": 3}, "width 3 is not a multiple of 8", "the nearest: --width 8"),
        ({"width": 93}, "width 93 is not a multiple of 8", "the nearest: --width 88"),
        (
            {"active": 0.95},
            "active 0.95 of 96 neurons is 96, rounded to a multiple of 16: nothing is pruned",
            "--width 88",
        ),
        ({"active": 0.5, "layers": "except-first:1"}, "layers: static_prune prunes all layers", "--layers all"),
        ({"active": 0.5, "layers": [0, 2]}, "one intermediate_size for all of them; got .0, 2.", "--layers all"),
        ({"active": 0.5, "layers": "some"}, "layers: cannot read 'some'", "all, even"),
        (
            {"active": 0.5, "refit": "scale"},
            "refit: scale fits a factor on routed experts",
            "--refit down, blocks or none",
        ),
        ({"active": 0.5, "parameters": {"x": 1}}, "unknown key 'x'", "no parameters"),
    ],
)
def test_recipes_that_cannot_be_carried_out(keys: dict[str, Any], message: str, hint: str, pico: Pico) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        upcycle.plan(str(pico("llama")), method="static_prune", calibration="demo", **keys)
    assert hint in str(caught.value.hint)


def test_ffns_that_are_too_narrow_are_said_to_be(pico: Pico) -> None:
    dense = replace(DenseCheckpoint.open(str(pico("llama"))).config, intermediate_size=8)
    for keys in ({"active": 0.5}, {"width": 8}):
        with pytest.raises(UsageError) as caught:
            kept_width(parse_recipe({"source": "x", "method": "static_prune", **keys}, "test"), dense)
        assert caught.value.hint == "FFNs of 8 neurons are too narrow to be pruned"


@pytest.mark.parametrize("layers", ["all", [2, 0, 1]])
def test_every_way_to_say_all_layers_is_understood(layers: Any, pico: Pico) -> None:
    plan = upcycle.plan(str(pico("llama")), method="static_prune", active=0.5, calibration="demo", layers=layers)
    assert plan.summary == "48 of 96 neurons are kept in every layer"


def test_a_width_that_hardware_has_not_is_warned_of(pico: Pico) -> None:
    plans = [
        upcycle.plan(str(pico("llama")), method="static_prune", width=width, calibration="demo") for width in (40, 48)
    ]
    said = [[warning for warning in plan.warnings if "multiple of 16" in warning] for plan in plans]
    assert [len(warnings) for warnings in said] == [1, 0]
    assert all("of the dense parameters are left" in plan.warnings[0] for plan in plans)
