"""Refits the experts of a model that lost whole layers, so that those that stay also do what these did.

A layer that stays is fitted as in ``refit_cut.py``, towards the uncut model's stream before the next layer
that stays: behind all layers between that are gone. Layers below the first that is gone have nothing to make up for. Where a norm
follows the experts (FlexOlmo), what the experts of the same layer put out is the aim.

N windows of W tokens, T = N W, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.module_paths import module_paths_of
from upcycle.architectures.stock import build_config, empty_model
from upcycle.calibration.compressing.made_parts import held_out_tokens
from upcycle.calibration.compressing.moe_walk import MoeWalk, Routed
from upcycle.calibration.compressing.refit_cut import LayerFit, stored_dtype, write_fitted
from upcycle.models.stock_layers import compute_buffers, compute_layer_buffers, layers_of
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint


def refit_depth(
    checkpoint: MoeCheckpoint,
    config: Mapping[str, Any],
    kept: Sequence[int],
    dtype: str,
    windows: torch.Tensor,
    folder: Path,
    progress: Progress,
) -> dict[int, dict[str, float]]:
    """Refit the layers that stay, and write the new down projections.

    Args:
        checkpoint: the MoE.
        config: the ``config.json`` of the result.
        kept: the layers that stay, ascending.
        dtype: the dtype that the result is written in, as a recipe means it.
        windows: the text, token ids ``[N, W]``.
        folder: where the files are written.
        progress: where to report.

    Returns:
        For every layer that was fitted, by its index in the uncut model, the same numbers as
        :func:`.refit_cut.refit_cuts`.
    """
    uncut = MoeWalk(layers_of(checkpoint, dtype), windows.shape[1])
    cut = MoeWalk(_KeptLayers(uncut, config, kept), windows.shape[1])
    reports: dict[int, dict[str, float]] = {}
    with progress.phase("refitting layers", len(uncut.layers)):
        theirs = torch.cat([uncut.embed(windows[batch]) for batch in uncut.batches(len(windows))])
        ours = theirs.clone()
        _advance(uncut, range(kept[0]), theirs)
        for place, index in enumerate(kept):
            behind = kept[place + 1] if place + 1 < len(kept) else len(uncut.layers)
            with uncut.loaded(index), cut.loaded(place):
                added, blocks, target = _behind(uncut, index, theirs)
                _advance(uncut, range(index + 1, behind), target)
                if place in cut.places and behind != place + 1:
                    fit = LayerFit(uncut, cut, place)
                    seen, left = _missing(cut, place, ours, target, blocks)
                    down, reports[index] = fit.fit(seen, left, added, held_out_tokens(ours))
                    stored = down.to(stored_dtype(checkpoint, dtype, index))
                    fit.set(stored)
                    write_fitted(folder, index, {"down": stored.contiguous()})
                theirs = target
                for batch in cut.batches(len(ours)):
                    ours[batch] = cut.run(place, ours[batch])
            progress.advance()
    return reports


def _advance(walk: MoeWalk, layers: range, states: torch.Tensor) -> None:
    """Run layers on states ``[N, W, d]``, in place."""
    for index in layers:
        with walk.loaded(index):
            for batch in walk.batches(len(states)):
                states[batch] = walk.run(index, states[batch])


def _behind(uncut: MoeWalk, index: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Run a loaded layer of the uncut model.

    Returns:
        The square of what its experts add, fp64 ``[T]`` (zeros where it has none); the output of its experts ``[T, d]`` where a norm
        follows them; and the stream behind it ``[N, W, d]``.
    """
    seen: list[Routed] = []
    blocks, added, behind = [], [], torch.empty_like(states)
    for batch in uncut.batches(len(states)):
        behind[batch] = uncut.run(index, states[batch], seen.append)
        if seen:
            one = seen.pop()
            blocks.append(one.block)
            added.append(one.output.double().square().sum(1))
    normed = bool(blocks) and uncut.norm_behind(index) is not None
    return torch.cat(added) if added else torch.zeros(0), torch.cat(blocks) if normed else None, behind


def _missing(
    cut: MoeWalk, place: int, ours: torch.Tensor, target: torch.Tensor, blocks: torch.Tensor | None
) -> tuple[list[Routed], torch.Tensor]:
    """Return what the experts of a loaded layer of the result do, and what is missing of its output, ``[T, d]``."""
    seen: list[Routed] = []
    left = []
    for batch in cut.batches(len(ours)):
        made = cut.run(place, ours[batch], seen.append)
        left.append(((target[batch] - made) / cut.multiplier).reshape(-1, made.shape[-1]))
    return seen, torch.cat(left) if blocks is None else blocks - torch.cat([one.block for one in seen])


class _KeptLayers:
    """Gives the layers of the result the weights of the layers that stay, out of a walk that holds them."""

    def __init__(self, uncut: MoeWalk, config: Mapping[str, Any], kept: Sequence[int]) -> None:
        self._uncut, self._kept = uncut, kept
        self.model: Any = empty_model(build_config(config, "config.json"), "config.json", torch.float32).eval()
        compute_buffers(self.model)
        self._layers = module_paths_of(self.model.config).layers_in(self.model)

    def load(self, index: int) -> None:
        """See :class:`upcycle.models.stock_layers.Layers`."""
        state = self._uncut.layers[self._kept[index]].state_dict()
        self._layers[index].load_state_dict(state, strict=True, assign=True)
        compute_layer_buffers(self.model, index)

    def drop(self, index: int) -> None:
        """See :class:`upcycle.models.stock_layers.Layers`."""
        self._layers[index].to("meta")
