"""What may be another when a run is continued, and what must not: one list, by key of the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError, UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.trainers.checkpoints.read import SavedRun
from upcycle.trainers.recipe.training_recipe import StageRecipe, TrainRecipe, parse_train_recipe

# Where the run is, how it is divided and computed, what is saved and said of it. The model is known by its weights.
_RUN = (
    "model", "output", "micro_batch", "zero.*", "expert_parallel", "experts", "activation_checkpointing", "keep_memory",
    "timeout", "saving.*", "log.*", "alarms.*", "bad_steps", "clip", "dense_states",
)  # fmt: skip
# Which validation texts are read, not which documents are held out.
_DATA = ("data.cache", "data.validation.tokens", "data.validation.batch")
# How large the steps are, and what is added to the loss.
_STAGE = (
    "name", "learning_rate", "rates", "rates.*", "weight_decay", "router_weight_decay", "schedule.*", "preset", "preset.*",
    "losses", "losses.*", "control.*", "distillation.cache", *_DATA,
)  # fmt: skip
_LENGTH = ("steps", "tokens")
_LEARNED = "learned"  # noise that has weights of its own

MAY_CHANGE = (
    "learning rates, schedules, weight decay, clip, losses, control, steps, stages that have not begun, validation, saving, log, "
    "alarms, zero, micro_batch and the like"
)
_MISSING = "nothing"


def identity(recipe: TrainRecipe, origin: Path) -> dict[str, Any]:
    """What ranks compare before they train together, and the weights that a run is known by."""
    told = recipe.model_dump(mode="json")
    keys = ("data", "stages", "length", "global_batch", "seed", "dtype", "clip", "optimizer")
    data = {**told["data"], "cache": None}
    for stage in told["stages"]:
        if stage["distillation"]:
            stage["distillation"]["cache"] = None
    return {"model": SafetensorsFolder(origin).fingerprint, **{key: told[key] for key in keys}, "data": data}


@dataclass(frozen=True)
class Change:
    """One key of the recipe that is not what it was."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {_text(self.was)}, and is {_text(self.now)}"


def accepted_changes(saved: SavedRun, recipe: TrainRecipe, model: str) -> list[Change]:
    """What a recipe changes in a run that it continues.

    Args:
        saved: the checkpoint to go on from.
        recipe: what the run is now to be.
        model: the fingerprint of the weights it began with.

    Raises:
        UsageError: something changes that would make it another run; every such key with both values.
    """
    then = saved.state["identity"].get("model")
    refused = [] if then == model else [Change("model", then, model)]
    accepted: list[Change] = []
    before, after = _known(saved), recipe.model_dump(mode="json")
    stages = before.pop("stages"), after.pop("stages")
    for change in _differences(before, after):
        (accepted if _matches(change.key, (*_RUN, *_DATA)) else refused).append(change)
    at, done = int(saved.state["stage"]), int(saved.state["stage_step"])
    for number in range(max(map(len, stages))):
        own, new = (listed[number] if number < len(listed) else {} for listed in stages)
        name = (new or own)["name"]
        if number > at or not own:
            accepted += [] if own == new else [Change(f"stages.{name}", own.get("name"), new.get("name"))]
        elif not new:
            refused.append(Change(f"stages.{name}", name, None))
        else:
            for change in _differences(own, new):
                told = Change(f"stages.{name}.{change.key}", change.was, change.now)
                free = _may_change(change) or (number == at and change.key in _LENGTH)
                (accepted if free else refused).append(told)
    if refused:
        raise UsageError(
            f"{saved.folder} is a checkpoint of another run: " + "; ".join(map(str, refused)),
            hint=f"put back what it was ({MAY_CHANGE} may change), give the run another output, or --restart to throw its "
            "checkpoints away",
        )
    steps = recipe.steps_of(recipe.stages[at])
    if steps < done:
        raise UsageError(
            f"stage '{recipe.stages[at].name}' is to have {steps} steps, and {saved.folder} has done {done} of it",
            hint=f"steps: {done} or more",
        )
    return accepted


def consequence(saved: SavedRun, recipe: TrainRecipe) -> str | None:
    """What a continued stage's next step will do with another learning rate than it would have had, in words."""
    at, done = int(saved.state["stage"]), int(saved.state["stage_step"])
    try:
        old = parse_train_recipe(saved.state["recipe"], str(saved.folder))
    except UpcycleError:
        return None
    was, now = _rate(old, old.stages[at], done), _rate(recipe, recipe.stages[at], done)
    if now is None or was == now:
        return None
    before = f"would have been {was:.3g}" if was is not None else "there would have been none"
    return f"the schedule is that of all {recipe.steps_of(recipe.stages[at])} steps: step {done + 1} has {now:.3g}, and {before}"


def _rate(recipe: TrainRecipe, stage: StageRecipe, step: int) -> float | None:
    if step >= recipe.steps_of(stage):
        return None
    rates, schedule = recipe.rate_and_schedule(stage)
    return rates.learning_rate * schedule(step)


def _known(saved: SavedRun) -> dict[str, Any]:
    """The recipe of a checkpoint with every key of today."""
    content = saved.state["recipe"]
    try:
        return parse_train_recipe(content, str(saved.folder)).model_dump(mode="json")
    except UpcycleError:  # of another version: as it was written
        return dict(content)


def _may_change(change: Change) -> bool:
    if change.key == "control.noise" and _LEARNED in (change.was, change.now):
        return False
    return _matches(change.key, _STAGE)


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _differences(was: Any, now: Any, path: str = "") -> Iterator[Change]:
    """The smallest parts that differ, with their path; items of a list are called by their names."""
    was, now = _by_name(was), _by_name(now)
    if not (isinstance(was, dict) and isinstance(now, dict)):
        if was != now:
            yield Change(path, was, now)
        return
    for key in {**was, **now}:
        inner = f"{path}.{key}" if path else str(key)
        if key in was and key in now:
            yield from _differences(was[key], now[key], inner)
        else:
            yield Change(inner, was.get(key), now.get(key))


def _by_name(value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        return {item["name"]: {key: part for key, part in item.items() if key != "name"} for item in value}
    return value


def _text(value: Any) -> str:
    return _MISSING if value is None else json.dumps(value)
