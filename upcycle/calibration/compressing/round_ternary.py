"""Rounds experts to three numbers per row, layer by layer, each for the inputs that reach it through the rounded layers below."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.expert_terms import LayerCut
from upcycle.calibration.compressing.made_parts import held_out_tokens
from upcycle.calibration.compressing.moe_walk import MoeWalk, Routed, active_neurons, walk_both
from upcycle.calibration.compressing.refit_cut import CutLayers, stored_dtype, write_fitted
from upcycle.ffn.rounding.ternary import ternary_of_least_error
from upcycle.models.stock_layers import layers_of
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint


def round_ternary(
    checkpoint: MoeCheckpoint,
    config: Mapping[str, Any],
    cuts: Mapping[int, LayerCut],
    dtype: str,
    windows: torch.Tensor,
    folder: Path,
    progress: Progress,
) -> dict[int, dict[str, float]]:
    """Round every layer, and write its experts; arguments and result are those of :func:`.refit_cut.refit_cuts`.

    ``missing_before`` is that of experts rounded to the nearest.
    """
    uncut = MoeWalk(layers_of(checkpoint, dtype), windows.shape[1])
    stored = partial(stored_dtype, checkpoint, dtype)
    rounded = MoeWalk(CutLayers(uncut, config, cuts, stored), windows.shape[1])
    reports: dict[int, dict[str, float]] = {}

    def round_one(index: int, theirs: torch.Tensor, ours: torch.Tensor) -> None:
        if index not in cuts:
            return
        before = _missing(uncut, rounded, index, theirs, ours)
        made = _round_layer(uncut, rounded, index, cuts[index], ours, stored(index))
        after = _missing(uncut, rounded, index, theirs, ours)
        reports[index] = {"missing_before": before, "missing_after": after, "strength": 0.0}
        write_fitted(folder, index, made)

    walk_both(uncut, rounded, windows, round_one, progress, "rounding experts")
    return reports


def _missing(uncut: MoeWalk, rounded: MoeWalk, index: int, theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """Return what is missing of the uncut stream on held-out windows, relative to what its experts had added, both squared."""
    width = theirs.shape[1]
    held = held_out_tokens(theirs)[::width]
    judged = torch.where(held)[0] if bool(held.any()) else torch.arange(len(theirs))
    missing = added = 0.0
    for batch in uncut.batches(len(judged)):
        seen: list[Routed] = []
        chosen = judged[batch]
        target = uncut.run(index, theirs[chosen], seen.append)
        made = rounded.run(index, ours[chosen])
        missing += ((target - made) / uncut.multiplier).double().square().sum().item()
        added += seen[0].output.double().square().sum().item()
    return missing / (added or 1.0)


def _round_layer(
    uncut: MoeWalk, rounded: MoeWalk, index: int, cut: LayerCut, ours: torch.Tensor, stored: torch.dtype
) -> dict[str, torch.Tensor]:
    """Round the experts of a loaded layer, let it compute with them, and return them: gate_up and down, as they are stored."""
    whole: Any = uncut.places[index].experts
    mine: Any = rounded.places[index].experts
    seen: list[Routed] = []
    for batch in uncut.batches(len(ours)):
        rounded.run(index, ours[batch], seen.append)
    x, ids = torch.cat([part.x for part in seen]), torch.cat([part.experts for part in seen])
    with torch.no_grad():
        for place, (term,) in enumerate(cut.experts):
            if not term.ternary:
                continue
            own = x[(ids == place).any(1)]
            made = ternary_of_least_error(whole.gate_up_proj[term.expert].float(), _gram(own))
            mine.gate_up_proj.data[place] = made.to(stored).float()
            hidden = active_neurons(mine, own, place)
            made = ternary_of_least_error(whole.down_proj[term.expert].float(), _gram(hidden))
            mine.down_proj.data[place] = made.to(stored).float()
    names = {"gate_up": mine.gate_up_proj, "down": mine.down_proj}
    return {name: tensor.detach().to(stored).contiguous().clone() for name, tensor in names.items()}


def _gram(inputs: torch.Tensor) -> torch.Tensor:
    return (inputs.T @ inputs).double()
