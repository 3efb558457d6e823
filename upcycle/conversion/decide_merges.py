"""Which means of the sources a method makes, where it finds that out from weights and text: once, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint
from upcycle.files.measured import Measured
from upcycle.files.names import MEASURED
from upcycle.planning.job import AnyJob
from upcycle.planning.open_sources import mix_sources
from upcycle.planning.prepare import job_for
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    import torch


def decide_merges(
    job: AnyJob, recipe: Recipe, checkpoint: MixedCheckpoint, windows: torch.Tensor, folder: Path, progress: Progress
) -> tuple[AnyJob, MixedCheckpoint, dict[str, Any]]:
    """The job and its checkpoint with the coefficients of every merge decided, and what they were decided by.

    They become the method's parameter ``coefficients``, which the written recipe holds: nobody has to decide again.

    Args:
        job: of the ``recipe`` as it was given, before its method worked out sizes.
        recipe: the same recipe.
        checkpoint: its sources.
        windows: the calibration tokens, ids ``[N, W]``.
        folder: where measurements are kept.
        progress: where to report.
    """
    decided = job.method.decide(checkpoint, recipe, windows, Measured(folder / MEASURED), progress)
    assert decided is not None, "only methods that say so are asked"
    coefficients, report = decided
    recipe = recipe.model_copy(update={"parameters": {**recipe.parameters, "coefficients": coefficients}})
    checkpoint = mix_sources(recipe, checkpoint.members[-1], checkpoint.sources)
    return job_for(recipe, checkpoint), checkpoint, {**report, "coefficients": coefficients}
