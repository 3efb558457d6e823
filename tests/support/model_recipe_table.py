"""Writes ``configs/models/table.yaml``, from which recipes for single models are made (``make recipes``).

Which models there are, and their real configurations with where these were found, is in ``model_configs.json``; all numbers are what
``upcycle plan`` prints of these configurations. A test compares the committed table with :func:`table`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from upcycle.cli.verbs.plan import plan_facts
from upcycle.conversion.jobs import JOBS
from upcycle.errors import RefusalError
from upcycle.files.formats.parsing import dump_yaml, read_json
from upcycle.formatting import count
from upcycle.planning.cost import Plan
from upcycle.planning.job import method_of
from upcycle.recipe.conversion_recipe import parse_recipe, read_recipe
from upcycle.recipe.model_recipes import table_file
from upcycle.recipe.shipped_recipes import shipped

CONFIGS = Path(__file__).with_name("model_configs.json")
COPIES = 8  # as Mixtral 8x7B, whose parameters are what eight copies of Mistral-7B have
HEADER = "# Recipes for models that many people have. Generated: edit tests/support/model_configs.json, and run make recipes\n"
PLANNED = ("parameters", "active", "FLOPs", "time", "on disk", "peak memory")  # which facts of a plan a recipe repeats


def model_configs() -> dict[str, Any]:
    """Return of every model its hub id, its parameters as published, its configuration, and where that was found."""
    return read_json(CONFIGS)


def planned(config: dict[str, Any], taken_from: str, keys: dict[str, Any]) -> Plan:
    """Plan a shipped recipe with a few other keys on a configuration, without weights."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        recipe = parse_recipe({**read_recipe(shipped("convert")[taken_from]), **keys, "source": folder}, taken_from)
        method = method_of(recipe)
        return JOBS[method.kind].of_configs(recipe, method).cost()


def model_entry(told: dict[str, Any]) -> dict[str, Any]:
    """Return a model's entry of the table: a split that runs half of the FFN neurons, and copies."""
    config, hub = told["config"], told["model"]
    split_keys: dict[str, Any] = {}
    try:
        split = planned(config, "split_50", split_keys)
    except RefusalError:  # its MoE architecture holds no dense first layer
        split_keys = {"layers": "all"}
        split = planned(config, "split_50", split_keys)
    copy_keys = {"experts": COPIES}
    copies = planned(config, "mixtral-4x", copy_keys)
    name = hub.rpartition("/")[2]
    size = count(copies.parameters_total)
    halves = f"{name} with half of its FFN neurons per token: {count(split.parameters_active)} of {_of(split)} active"
    larger = f"{name} as {size} parameters, {count(copies.parameters_active)} active: {COPIES} copies of every FFN, "
    larger += "exact until trained"
    return {
        "source": hub,
        "recipes": {
            "split50": _entry(halves, "split_50", split_keys, split),
            f"upcycle{_short(copies.parameters_total)}": _entry(larger, "mixtral-4x", copy_keys, copies),
        },
    }


def _of(plan: Plan) -> str:
    return f"{count(plan.parameters_total)} ({plan.parameters_active / plan.parameters_dense:.2f}x)"


def _short(parameters: int) -> str:
    """Return a size as in models' names: 692m, 6.9b, 47b."""
    for unit, letter in ((10**9, "b"), (10**6, "m")):
        if parameters >= 0.95 * unit:
            amount = parameters / unit
            return f"{amount:.0f}{letter}" if amount >= 9.95 else f"{amount:.1f}".removesuffix(".0") + letter
    raise ValueError(f"{parameters} parameters")


def _entry(what: str, taken_from: str, keys: dict[str, Any], plan: Plan) -> dict[str, Any]:
    facts = dict(plan_facts(plan))
    if plan.time and "unknown" in plan.time:
        del facts["time"]
    told = {name: facts[name] for name in PLANNED if name in facts}
    return {"what": what, "from": taken_from, **({"keys": keys} if keys else {}), "plan": told}


def table(models: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the table of some models, or of all."""
    configs = model_configs()
    return {name: model_entry(configs[name]) for name in models or configs}


if __name__ == "__main__":
    table_file().write_text(HEADER + dump_yaml(table()), encoding="utf-8")
    sys.stdout.write(f"{table_file()}\n")
