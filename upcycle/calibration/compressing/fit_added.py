"""Fits the router rows of an expert that is added to a Mixture-of-Experts, layer by layer, one in memory at a time.

Every layer is fitted to what its router will read: the stream behind the layers below, with the added expert in them.

N windows of W tokens, d the hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from upcycle.architectures.added_expert import AddedMatrix, AddedRows, with_expert
from upcycle.architectures.module_paths import module_paths_of
from upcycle.architectures.stock import build_config, empty_model
from upcycle.calibration.compressing.made_parts import held_out_tokens
from upcycle.calibration.compressing.moe_walk import MoeWalk, Routed
from upcycle.errors import CheckpointError
from upcycle.models.stock_layers import compute_buffers, compute_layer_buffers, layers_of
from upcycle.progress import Progress
from upcycle.routers.for_mixing.added_row import RowTokens, fit_row
from upcycle.trainers.routing.stock_routers import selection_bias

if TYPE_CHECKING:
    from upcycle.checkpoints.extended_moe import ExtendedMoe
    from upcycle.methods.growing.add_expert import NewRows


class FittedRows(NamedTuple):
    """The rows of the new expert by layer, and for every layer how many held-out tokens choose it, unit and strength of the fit."""

    rows: NewRows
    reports: dict[int, dict[str, float]]


def fit_added_rows(
    checkpoint: ExtendedMoe,
    config: Mapping[str, Any],
    scale: float,
    sharpness: float,
    dtype: str,
    windows: tuple[torch.Tensor, torch.Tensor],
    progress: Progress,
) -> FittedRows:
    """Fit the rows of all layers.

    Args:
        checkpoint: the MoE and the dense model.
        config: the ``config.json`` of the result.
        scale: multiplies what the new expert adds.
        sharpness: see :func:`upcycle.routers.for_mixing.added_row.fit_row`.
        dtype: the dtype that the result is written in, as a recipe means it.
        windows: token ids ``[N, W]`` of text for the experts that there are, and of text of the new expert's kind.
        progress: where to report.

    Raises:
        CheckpointError: the states are not finite.
    """
    old, new = windows
    before = MoeWalk(layers_of(checkpoint, dtype), old.shape[1])
    layers = _ExtendedLayers(checkpoint, before, config, scale, dtype)
    walk = MoeWalk(layers, old.shape[1])
    ids = torch.cat([old, new])
    is_new = torch.arange(len(ids)).repeat_interleave(ids.shape[1]) >= len(old)
    held = torch.cat([judging_tokens(old), judging_tokens(new)])
    found = FittedRows({}, {})
    with progress.phase("fitting router rows", len(walk.layers)):
        states = torch.cat([before.embed(ids[batch]) for batch in before.batches(len(ids))])
        for index in range(len(walk.layers)):
            with before.loaded(index), walk.loaded(index):
                chosen: list[torch.Tensor] = []
                report: dict[str, float] = {}
                if index in walk.places:
                    inputs: list[torch.Tensor] = []
                    for batch in walk.batches(len(ids)):
                        walk.run(index, states[batch], partial(_note_input, inputs))
                    x = torch.cat(inputs)
                    _check_finite(x, index)
                    found.rows[index], report = layers.fitted(index, RowTokens(x, is_new, held), sharpness)
                for batch in walk.batches(len(ids)):
                    states[batch] = walk.run(
                        index, states[batch], partial(_note_choice, chosen, checkpoint.model.experts)
                    )
                if chosen:
                    found.reports[index] = {**_shares(torch.cat(chosen), is_new, held), **report}
            progress.advance()
    return found


def judging_tokens(windows: torch.Tensor) -> torch.Tensor:
    """Return which tokens of ``[N, W]`` judge the fit, ``[T]``: every eighth window; of fewer windows, the last eighth of all tokens.

    A text of which none judged would not be heard when the strength of the ridge is chosen.
    """
    held = held_out_tokens(windows[..., None])
    if not bool(held.any()):
        held[-max(1, len(held) // 8) :] = True
    return held


def _note_input(inputs: list[torch.Tensor], routed: Routed) -> None:
    inputs.append(routed.x)


def _note_choice(chosen: list[torch.Tensor], expert: int, routed: Routed) -> None:
    chosen.append((routed.experts == expert).any(1))


def _shares(chosen: torch.Tensor, new: torch.Tensor, held: torch.Tensor) -> dict[str, float]:
    """Return which share of either side's held-out tokens ``chosen`` ``[T]`` says."""
    sides = {"own_tokens": new, "other_tokens": ~new}
    return {name: chosen[held & side].double().mean().item() for name, side in sides.items()}


def _check_finite(states: torch.Tensor, index: int) -> None:
    if not bool(states.isfinite().all()):
        raise CheckpointError(
            f"layer {index}: the calibration states are not finite",
            hint="use the checkpoints in the dtype they were trained in",
        )


class _ExtendedLayers:
    """Gives the layers of the extended model their weights: those of a walk that holds the MoE's layer, and the new expert's."""

    def __init__(
        self, checkpoint: ExtendedMoe, before: MoeWalk, config: Mapping[str, Any], scale: float, dtype: str
    ) -> None:
        self._checkpoint, self._before, self._scale, self._dtype = checkpoint, before, scale, dtype
        self.model: Any = empty_model(build_config(config, "config.json"), "config.json", torch.float32).eval()
        compute_buffers(self.model)
        self._layers = module_paths_of(self.model.config).layers_in(self.model)

    def load(self, index: int) -> None:
        """See :class:`upcycle.models.stock_layers.Layers`; the new expert's row is zero."""
        model = self._checkpoint.model
        state = dict(self._before.layers[index].state_dict())
        if index in model.moe_layers:
            state |= self._extended(index)
        self._layers[index].load_state_dict(state, strict=True, assign=True)
        compute_layer_buffers(self.model, index)

    def _extended(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a layer that have one more expert, by their names inside the layer of the stock class."""
        matrices: dict[str, torch.Tensor] = {}
        for _, origin in with_expert(self._checkpoint.model, index, (), (), self._scale):
            if isinstance(origin, AddedMatrix | AddedRows) and origin.part != "values":
                for part in ("gate", "up") if origin.part == "gate_up" else (origin.part,):
                    matrices[part] = self._checkpoint.new_matrix(origin, part, self._dtype).float()
        found, wanted = {}, self._layers[index].state_dict()
        for name, whole in self._before.layers[index].state_dict().items():
            if whole.shape == wanted[name].shape:
                continue
            if len(wanted[name]) == 1:  # a bias behind a dimension of size 1
                found[name] = torch.cat([whole, whole.new_zeros(1, 1)], 1)
                continue
            if ".experts." not in f".{name}":
                last = torch.zeros_like(whole[0])
            elif name.endswith("down_proj"):
                last = matrices["down"]
            else:
                last = torch.cat([matrices["gate"], matrices["up"]])
            found[name] = torch.cat([whole, last[None]])
        return found

    def set(self, index: int, row: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Let a loaded layer's router compute with the new expert's row ``[d]``, and its bias."""
        wanted = self._before.layers[index].state_dict()
        for name, whole in self._layers[index].state_dict().items():
            if whole.shape != wanted[name].shape and ".experts." not in f".{name}":
                flat = whole.view(-1) if len(whole) == 1 else whole
                flat[-1] = bias if flat.dim() == 1 else row

    def drop(self, index: int) -> None:
        """See :class:`upcycle.models.stock_layers.Layers`."""
        self._layers[index].to("meta")

    def fitted(self, index: int, tokens: RowTokens, sharpness: float) -> tuple[tuple[float, ...], dict[str, float]]:
        """Fit the row of a loaded layer, and let the layer compute with it.

        Where routers add a bias to scores for the choice, the new expert has the mean of the others'.

        Returns:
            The row as it is stored, with the bias behind it where there is one; and the report.

        Raises:
            CheckpointError: the row overflows the dtype that it is stored in.
        """
        before = self._before.places[index]
        made = fit_row(tokens, next(part for part in before.router.parameters() if part.dim() == 2).detach(), sharpness)
        row, bias = self._rounded(index, "router", made.row), None
        if not bool(row.isfinite().all()):
            hint = "--dtype bfloat16"
            raise CheckpointError(f"layer {index}: the new expert's router row overflows {row.dtype}", hint=hint)
        if (biases := selection_bias(before.block, before.router)) is not None:
            bias = self._rounded(index, "bias", biases.detach().double().mean())
        self.set(index, row.float(), None if bias is None else bias.float())
        values = (*row.tolist(), *([] if bias is None else [bias.item()]))
        return values, {"unit": made.unit, "strength": made.strength}

    def _rounded(self, index: int, role: str, values: torch.Tensor) -> torch.Tensor:
        """Return what is stored of a router's row or bias, in the dtype of the others'."""
        model = self._checkpoint.model
        name = next(name for name in model.names[index] if model.role(name) == role)
        return values.to(getattr(torch, self._checkpoint.dtype_of(name, self._dtype)))
