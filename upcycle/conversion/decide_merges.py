"""Which means of the sources a method makes, where it finds that out from weights and text: once, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint, mix_sources
from upcycle.files.formats.parsing import read_lines
from upcycle.files.output.workspace import MEASURED
from upcycle.planning.cost import AnyJob, job_for
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    import torch


class Measured:
    """What was measured, one JSON line each in a file: a run that continues measures none of it again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        if path.exists():
            self._found.update(read_lines(path))
            self._write("w", *self._found.items())

    def __call__(self, key: str, measure: Callable[[], Any]) -> Any:
        """The plain data measured under ``key``, or what ``measure()`` gives now."""
        if key not in self._found:
            self._found[key] = measure()
            self._write("a", (key, self._found[key]))
        return self._found[key]

    def _write(self, mode: str, *items: tuple[str, Any]) -> None:
        with self._path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(item) + "\n" for item in items)


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
