"""Refits a MoE some of whose layers got an FFN in the place of their experts, in closed form, layer by layer.

FFNs are fitted as :mod:`upcycle.calibration.compressing.refit_dense` does, and the experts of layers above the first of them as
:mod:`upcycle.calibration.compressing.refit_cut` does, all towards the uncut model's stream behind the same layer.

N windows of W tokens, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.expert_terms import DenseCut, LayerCut
from upcycle.architectures.module_paths import module_paths_of
from upcycle.architectures.stock import build_config, empty_model
from upcycle.calibration.compressing.moe_walk import MoeWalk, walk_both
from upcycle.calibration.compressing.refit_cut import LayerFit, stored_dtype, write_fitted
from upcycle.calibration.compressing.refit_dense import FfnFit
from upcycle.methods.compressing.described_cuts import Cut
from upcycle.models.stock_layers import compute_buffers, compute_layer_buffers, layers_of
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint


def refit_mixed(
    checkpoint: MoeCheckpoint,
    config: Mapping[str, Any],
    cuts: Mapping[int, Cut],
    dtype: str,
    windows: torch.Tensor,
    folder: Path,
    progress: Progress,
) -> dict[int, dict[str, float]]:
    """Refit the FFNs in the place of experts, and the experts above them, and write the new down projections.

    Args:
        checkpoint: the MoE.
        config: the ``config.json`` of the result.
        cuts: what becomes of the experts of every layer.
        dtype: the dtype that the result is written in, as a recipe means it.
        windows: the text, token ids ``[N, W]``.
        folder: where the files are written.
        progress: where to report.

    Returns:
        For every layer that was fitted the same numbers as :func:`upcycle.calibration.compressing.refit_cut.refit_cuts`.
    """
    uncut = MoeWalk(layers_of(checkpoint, dtype), windows.shape[1])
    cut = MoeWalk(_MixedLayers(uncut, checkpoint, config, cuts, dtype), windows.shape[1])
    reports: dict[int, dict[str, float]] = {}

    def keep(index: int, down: torch.Tensor) -> torch.Tensor:
        """Write down projections, and return them as they will be read."""
        stored = down.to(stored_dtype(checkpoint, dtype, index)).contiguous()
        write_fitted(folder, index, {"down": stored})
        return stored.float()

    def refit(index: int, theirs: torch.Tensor, ours: torch.Tensor) -> None:
        own = cuts.get(index)
        if isinstance(own, DenseCut):
            down: Any = cut.layers[index].get_submodule(f"{_block(cut)}.down_proj")
            _, reports[index] = FfnFit(uncut, cut, index, down).solve(theirs, ours)
            down.weight.data = keep(index, down.weight.detach())
        elif isinstance(own, LayerCut) and reports:
            fit = LayerFit(uncut, cut, index)
            made, reports[index] = fit.solve(theirs, ours)
            fit.set(keep(index, made))

    walk_both(uncut, cut, windows, refit, progress, "refitting layers")
    return reports


def _block(walk: MoeWalk) -> str:
    """Return the path of a layer's FFN below the layer."""
    return module_paths_of(walk.model.config).block


class _MixedLayers:
    """Gives the layers of the result their weights: those of a walk that holds the uncut layer, or an FFN made of its experts."""

    def __init__(
        self,
        uncut: MoeWalk,
        checkpoint: MoeCheckpoint,
        config: Mapping[str, Any],
        cuts: Mapping[int, Cut],
        dtype: str,
    ) -> None:
        self._uncut, self._checkpoint, self._cuts, self._dtype = uncut, checkpoint, cuts, dtype
        self.model: Any = empty_model(build_config(config, "config.json"), "config.json", torch.float32).eval()
        compute_buffers(self.model)
        self._paths = module_paths_of(self.model.config)
        self._layers = self._paths.layers_in(self.model)

    def load(self, index: int) -> None:
        """See :class:`upcycle.models.stock_layers.Layers`."""
        state = self._uncut.layers[index].state_dict()
        cut, block = self._cuts.get(index), f"{self._paths.block}."
        if isinstance(cut, DenseCut):
            state = {name: tensor for name, tensor in state.items() if not name.startswith(block)}
            stored = stored_dtype(self._checkpoint, self._dtype, index)
            parts = [self._checkpoint.dense_part(index, part) for part in cut.parts]
            for name in ("gate", "up", "down"):
                made = torch.cat([part[name] for part in parts], 1 if name == "down" else 0)
                state[f"{block}{name}_proj.weight"] = made.to(stored).float()
        self._layers[index].load_state_dict(state, strict=True, assign=True)
        compute_layer_buffers(self.model, index)

    def drop(self, index: int) -> None:
        """See :class:`upcycle.models.stock_layers.Layers`."""
        self._layers[index].to("meta")
