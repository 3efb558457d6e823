"""Unmasks what is new in a model that masked growth made, in the first stage of its first run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upcycle.architectures.dense.widened import new_parts
from upcycle.errors import UsageError
from upcycle.models.growth_masks import GrowthMasks
from upcycle.trainers.recipe.training_recipe import StageRecipe, TrainRecipe


def check_masks(recipe: TrainRecipe, origin: Path) -> None:
    """Refuse a run that would train masked parts without unmasking them, or unmask what has no masks.

    Args:
        recipe: the run's.
        origin: the folder of the model that it starts from.

    Raises:
        UsageError: names the stage.
    """
    first, *others = recipe.stages
    late = next((stage.name for stage in others if stage.masks), None)
    if late:
        raise UsageError(
            f"stage '{late}': masks: what is new is unmasked in the first stage alone, '{first.name}'",
            hint="give masks to the first stage",
        )
    parts, steps = new_parts(origin), recipe.steps_of(first)
    if parts is None and first.masks:
        raise UsageError(
            f"stage '{first.name}': masks: {recipe.model} has none: masked_growth did not make it, or it was trained since",
            hint="leave masks out",
        )
    if parts is not None and first.masks is None:
        raise UsageError(
            f"stage '{first.name}': {recipe.model} was grown by masked_growth: what is new in it is masked until a stage unmasks it",
            hint=f"set stages.0.masks.steps, at most {steps}",
        )
    if first.masks and first.masks.steps > steps:
        raise UsageError(
            f"stage '{first.name}': masks.steps is {first.masks.steps}, and the stage has {steps} steps: some masks would be left",
            hint=f"masks.steps: at most {steps}",
        )


def masks_of(recipe: TrainRecipe, stage: StageRecipe, origin: Path, model: Any) -> GrowthMasks | None:
    """The masks of a stage's model; None where it has none, as in every later stage.

    Args:
        recipe: the run's, which :func:`check_masks` accepted.
        stage: one of its stages.
        origin: the folder of the model that the run starts from.
        model: the stage's.
    """
    parts = new_parts(origin)
    return GrowthMasks(model, parts) if parts is not None and stage is recipe.stages[0] else None
