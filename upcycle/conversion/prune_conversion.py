"""Carries out prunings: calibrates, decides and writes the smaller FFNs as experts are, and verifies the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from upcycle.checkpoints.checkpoint import Checkpoint, DenseCheckpoint
from upcycle.conversion.expert_conversion import ExpertConversion
from upcycle.methods.base import AnyMethod
from upcycle.planning.from_configs import describe_dense
from upcycle.planning.open_sources import mix_of
from upcycle.planning.prune_job import PruneJob, prepare_pruning
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class PruneConversion(PruneJob, ExpertConversion):
    """A job that makes a dense model's FFNs smaller. Implements :class:`upcycle.conversion.job.ConversionJob`."""

    brought: ClassVar[str] = "--active and --width"

    @classmethod
    def of_checkpoint(cls, recipe: Recipe, method: AnyMethod, checkpoint: Checkpoint) -> Self:
        """Plan a recipe on an opened dense model."""
        assert isinstance(checkpoint, DenseCheckpoint)
        return prepare_pruning(
            cls,
            recipe,
            method,
            checkpoint.family,
            checkpoint.config,
            checkpoint.raw_config,
            checkpoint.store.specs,
            checkpoint.has_tokenizer,
            mix_of(checkpoint),
            checkpoint.note(recipe.dtype),
        )

    @classmethod
    def of_configs(cls, recipe: Recipe, method: AnyMethod) -> Self:
        """Plan a recipe from its source's ``config.json`` alone."""
        found = describe_dense(recipe, method)
        return prepare_pruning(cls, recipe, method, found.family, found.dense, found.raw, found.specs, mix=found.mix)
