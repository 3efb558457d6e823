"""Decides which sources a method merges, and with which weights, where it finds that out from weights and text.

This happens once, before anything is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint
from upcycle.conversion.job import ConversionJob
from upcycle.conversion.jobs import job_for
from upcycle.files.measured import MeasurementCache
from upcycle.files.names import MEASURED
from upcycle.methods.base import AnyMethod
from upcycle.methods.mixing.base import mixing
from upcycle.planning.open_sources import mix_sources
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import Recipe
from upcycle.recipe.validated import validated

if TYPE_CHECKING:
    import torch


def decide_merges(
    method: AnyMethod,
    recipe: Recipe,
    checkpoint: MixedCheckpoint,
    windows: torch.Tensor,
    folder: Path,
    progress: Progress,
) -> tuple[ConversionJob, MixedCheckpoint, dict[str, Any]]:
    """Decide the coefficients of every merge.

    They become the method's parameter ``coefficients`` in the recipe that is written, so that a later run need not decide again.

    Args:
        method: the recipe's method.
        recipe: the user's recipe, before its method worked out sizes.
        checkpoint: its sources.
        windows: the calibration tokens, ids ``[N, W]``.
        folder: where measurements are kept.
        progress: where to report.

    Returns:
        The job and its checkpoint with the coefficients, and the measurements that decided them, as plain data.
    """
    mixes = mixing(method)
    assert mixes is not None, "only methods that mix can be undecided"
    decided = mixes.decide(checkpoint, recipe, windows, MeasurementCache(folder / MEASURED), progress)
    assert decided is not None, "only methods that say so are asked"
    coefficients, report = decided
    recipe = recipe.model_copy(update={"parameters": {**recipe.parameters, "coefficients": coefficients}})
    method = type(mixes)(validated(type(mixes).Parameters, recipe.parameters, "parameters"))
    checkpoint = mix_sources(recipe, method, checkpoint.members[-1], checkpoint.sources)
    return job_for(recipe, method, checkpoint), checkpoint, {**report, "coefficients": coefficients}
