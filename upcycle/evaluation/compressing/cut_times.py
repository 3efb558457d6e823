"""Times models of the shapes that compressions leave beside the uncut one, in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.evaluation.compare_times import time_beside
from upcycle.evaluation.compressing.cut_candidates import CutCandidate
from upcycle.evaluation.shape_speed import OWN, STOCK, ShapeKey, Times
from upcycle.methods.compressing.base import CutSizes
from upcycle.progress import Progress

_UNCUT = "uncut"


@dataclass(frozen=True)
class CutTiming:
    """Holds the times of shapes relative to the uncut model's with stock kernels, and its own in seconds.

    ``about`` says how they were measured, as plain data.
    """

    uncut: Times
    shapes: Mapping[ShapeKey, Times]
    about: dict[str, Any]

    def speeds(self, sizes: CutSizes) -> dict[str, dict[str, float]]:
        """Return tokens per second, ``prefill`` and ``decode``, relative to the uncut model's with the same kernels."""
        found = {}
        for how in (STOCK, OWN):
            mine, theirs = self.shapes[_name(sizes), how], self.shapes[_UNCUT, how]
            found[how] = {"prefill": theirs.prefill / mine.prefill, "decode": theirs.decode / mine.decode}
        return found

    def speed(self, sizes: CutSizes) -> float:
        """Return how many times as fast a whole request is as the uncut model's, either with its faster kernels."""
        return min(self._requests(_UNCUT)) / min(self._requests(_name(sizes)))

    def _requests(self, name: str) -> list[float]:
        found = (self.shapes[name, how] for how in (STOCK, OWN))
        return [Times(t.prefill * self.uncut.prefill, t.decode * self.uncut.decode).request() for t in found]


def time_cuts(
    checkpoint: MoeCheckpoint, candidates: Sequence[CutCandidate], batch: int, progress: Progress, dtype: torch.dtype
) -> CutTiming:
    """Time every shape among the candidates once, with random weights: how long a model takes depends on its shapes alone."""
    model, raw = checkpoint.model, checkpoint.raw_config
    configs: dict[str, Mapping[str, Any]] = {  # the stock class stands for upcycle_moe of the same sizes
        _name(one.sizes): model.config_with(*one.sizes[:3]) if one.job.wraps else one.job.config for one in candidates
    }
    shapes = {
        name: (config, int(model.family.text(config).get("num_hidden_layers", model.layers)))
        for name, config in {_UNCUT: raw, **configs}.items()
    }
    layers = (
        sum(checkpoint.store.specs[name].elements for name in names)
        for layer, names in model.names.items()
        if layer is not None
    )
    return CutTiming(*time_beside(raw, shapes, 4 * max(layers), model.layers, batch, progress, dtype=dtype))


def _name(sizes: CutSizes) -> str:
    layers = f", {sizes.layers} layers" if sizes.layers else ""
    layers += f", {sizes.dense} without" if sizes.dense else ""
    return f"{sizes.experts} experts of {sizes.width} neurons, {sizes.top_k} chosen{layers}"
