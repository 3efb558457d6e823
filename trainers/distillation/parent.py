"""The dense parent as a teacher: what a training step asks of it. B rows, L positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from upcycle.trainers.data.packed_attention import packed_forward
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.distillation.expert_targets import FfnRecord, capture_ffns
from upcycle.trainers.distillation.logit_cache import LogitCache
from upcycle.trainers.distillation.losses import OutputRecord, capture_outputs, layer_outputs, parent_sizes
from upcycle.trainers.distillation.truncated_logits import TopLogits
from upcycle.trainers.recipe.training_recipe import DistillationRecipe
from upcycle.trainers.routing.recorder import Recorder


class Parent:
    """The dense model that a student is distilled from. It runs beside the student on the same tokens.

    Args:
        load: loads the model. Called at once, or, with a cache, when a row is first found missing from it.
        recipe: which of its outputs the student is to match, and how much each counts.
        cache: its next-token distributions on disk, if they are kept.
        anywhere: tells whether something that is so here, or not, is so on any rank that the parent's weights are divided among;
            these must run it together.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        recipe: DistillationRecipe,
        cache: LogitCache | None = None,
        anywhere: Callable[[bool], bool] = bool,
    ) -> None:
        self._load, self.recipe, self.cache, self._anywhere = load, recipe, cache, anywhere
        self._model: Any = None
        matches_layers = recipe.hidden > 0 or recipe.ffn > 0
        self.outputs: Recorder[OutputRecord] | None = capture_outputs(self.model) if matches_layers else None
        self.ffns: Recorder[FfnRecord] | None = capture_ffns(self.model) if recipe.taught else None
        if cache is None:
            _ = self.model  # loaded now, so that a missing or unfit model is refused before the first step

    @property
    def model(self) -> Any:
        """The model, in evaluation mode and without gradients; loaded when first used."""
        if self._model is None:
            self._model = self._load().eval().requires_grad_(False)
        return self._model

    @torch.no_grad()
    def logits(self, batch: PackedBatch, last: int = 0) -> torch.Tensor:
        """Logits ``[B, L, V]`` of a batch on the model's device, or ``[B, last, V]`` of its last positions alone."""
        logits: torch.Tensor = packed_forward(self.model, batch, last).logits
        return logits

    def sizes(self, batch: PackedBatch) -> torch.Tensor:
        """The squared sizes of its outputs for the batch that has just run, as :func:`parent_sizes` gives them."""
        assert self.outputs is not None
        return parent_sizes(self.recipe, layer_outputs(self.outputs.take()), batch.mask)

    def targets(self, batch: PackedBatch) -> torch.Tensor | TopLogits:
        """What the student's logits are compared with: ``[B, L, V]``, or cached ones of all positions but the last."""
        if self.cache is not None:
            return self.cache.targets(batch, self.logits, self._anywhere)
        return self.logits(batch)
