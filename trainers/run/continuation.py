"""Which keys of a recipe may change when a run is continued, and which would make it another run."""

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

# Keys that may change at any time, as patterns.
# Of the run: where it is, how it is divided and computed, what is saved and reported. The model is recognised by its weights.
_RUN = (
    "model", "output", "micro_batch", "zero.*", "expert_parallel", "experts", "activation_checkpointing", "keep_memory",
    "timeout", "saving.*", "log.*", "alarms.*", "bad_steps", "clip", "dense_states",
)  # fmt: skip
# Of the data: how much held-out text is read, but not which documents are held out.
_DATA = ("data.cache", "data.bad_images", "data.validation.tokens", "data.validation.batch")
# Of a stage: how large the steps are, and what is added to the loss.
_STAGE = (
    "name", "learning_rate", "rates", "rates.*", "weight_decay", "router_weight_decay", "schedule.*", "preset", "preset.*",
    "losses", "losses.*", "tower_losses", "tower_losses.*", "control.*", "distillation.cache", *_DATA,
)  # fmt: skip
_LENGTH = ("steps", "tokens")  # may change in the stage that is under way
_LEARNED = "learned"  # router noise that has weights of its own, which a checkpoint has or lacks

MAY_CHANGE = (
    "learning rates, schedules, weight decay, clip, losses, control, steps, stages that have not begun, validation, saving, log, "
    "alarms, zero, micro_batch and the like"
)
_MISSING = "nothing"


def run_identity(recipe: TrainRecipe, origin: Path) -> dict[str, Any]:
    """What must be the same on all ranks: the fingerprint of the weights that a run began with, and keys of its recipe."""
    content = recipe.model_dump(mode="json")
    keys = ("data", "stages", "length", "global_batch", "seed", "dtype", "clip", "optimizer", "adapter")
    data = {**content["data"], "cache": None}  # a cache may lie elsewhere on each machine
    for stage in content["stages"]:
        if stage["distillation"]:
            stage["distillation"]["cache"] = None
    return {"model": SafetensorsFolder(origin).fingerprint, **{key: content[key] for key in keys}, "data": data}


@dataclass(frozen=True)
class Change:
    """One key of the recipe that differs from the checkpoint's: ``key`` is its dotted path."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {_text(self.was)} and is now {_text(self.now)}"


def accepted_changes(saved: SavedRun, recipe: TrainRecipe, model: str) -> list[Change]:
    """The changes that a recipe makes to the run that it continues.

    Args:
        saved: the checkpoint to continue from.
        recipe: the run's, now.
        model: the fingerprint of the weights that ``recipe.model`` has.

    Raises:
        UsageError: a change would make it another run; names every such key with both values.
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
        old, new = (listed[number] if number < len(listed) else {} for listed in stages)
        name = (new or old)["name"]
        if number > at or not old:  # a stage that has not begun may be anything
            accepted += [] if old == new else [Change(f"stages.{name}", old.get("name"), new.get("name"))]
        elif not new:
            refused.append(Change(f"stages.{name}", name, None))
        else:
            for change in _differences(old, new):
                named = Change(f"stages.{name}.{change.key}", change.was, change.now)
                free = _may_change(change) or (number == at and change.key in _LENGTH)
                (accepted if free else refused).append(named)
    if refused:
        raise UsageError(
            f"{saved.folder} is a checkpoint of another run: " + "; ".join(map(str, refused)),
            hint=f"undo these changes ({MAY_CHANGE} may change), give the run another output, or use --restart to discard its "
            "checkpoints and begin again",
        )
    steps = recipe.steps_of(recipe.stages[at])
    if steps < done:
        raise UsageError(
            f"stage '{recipe.stages[at].name}' has {steps} steps in the recipe, but {saved.folder} has already done {done}",
            hint=f"set steps to {done} or more",
        )
    return accepted


def consequence(saved: SavedRun, recipe: TrainRecipe) -> str | None:
    """A sentence on how changed rates or lengths change the next step's learning rate; ``None``: not at all."""
    at, done = int(saved.state["stage"]), int(saved.state["stage_step"])
    try:
        old = parse_train_recipe(saved.state["recipe"], str(saved.folder))
    except UpcycleError:
        return None
    was, now = _rate(old, old.stages[at], done), _rate(recipe, recipe.stages[at], done)
    if now is None or was == now:
        return None
    before = f"{was:.3g}" if was is not None else "no further step"
    return (
        f"the schedule now spans {recipe.steps_of(recipe.stages[at])} steps: the learning rate of step {done + 1} is {now:.3g}; "
        f"the old recipe had {before}"
    )


def _rate(recipe: TrainRecipe, stage: StageRecipe, step: int) -> float | None:
    if step >= recipe.steps_of(stage):
        return None
    rates, schedule = recipe.rate_and_schedule(stage)
    return rates.learning_rate * schedule(step)


def _known(saved: SavedRun) -> dict[str, Any]:
    """The recipe of a checkpoint, with the defaults of keys that are newer than it."""
    content = saved.state["recipe"]
    try:
        return parse_train_recipe(content, str(saved.folder)).model_dump(mode="json")
    except UpcycleError:  # written by another version: compared as it is
        return dict(content)


def _may_change(change: Change) -> bool:
    if change.key == "control.noise" and _LEARNED in (change.was, change.now):
        return False
    return _matches(change.key, _STAGE)


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _differences(was: Any, now: Any, path: str = "") -> Iterator[Change]:
    """The innermost parts that differ, with their dotted paths; items of a list go by their names."""
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
