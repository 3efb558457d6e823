"""Refits the down projections of a compressed Mixture-of-Experts towards the layer that it had, in closed form, layer by layer.

With e(x) what is missing of the uncut model's stream behind a layer, and a(x) the activations of the chosen experts' neurons, each
times its expert's weight, the update D of all down projections minimises ``sum_t ||e(x_t) - D a(x_t)||^2 + strength * ||D||^2``.
e also holds what the layers below left: a layer makes up for their errors (as :mod:`upcycle.ffn.refit` does for splits). Where a
norm follows the experts (FlexOlmo), the stream is no linear function of D, and e is what is missing of the experts' own sum. Experts
of few neurons are fitted together; where the joint Gram matrix would be too large, one after another, those of most tokens first.

T tokens, E' experts that are left, F neurons each, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from upcycle.architectures.expert_terms import LayerCut
from upcycle.architectures.fused_form import PLAIN, clamped_form
from upcycle.architectures.stock import build_config, empty_model
from upcycle.calibration.compressing.made_parts import held_out_tokens, made_parts
from upcycle.calibration.compressing.moe_walk import (
    MoeWalk,
    Routed,
    active_neurons,
    down_projections,
    set_down_projections,
    walk_both,
)
from upcycle.calibration.compressing.result_layers import ResultLayers
from upcycle.checkpoints.moe_checkpoint import sum_of_terms
from upcycle.ffn.random_weights import stream
from upcycle.ffn.refit import REFIT_STRENGTHS
from upcycle.ffn.ridge_sums import RidgeSums
from upcycle.files.atomic_files import write_whole
from upcycle.files.output.workspace import LAYER_BLUEPRINTS
from upcycle.models.stock_layers import compute_buffers, compute_layer_buffers, layers_of
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.architectures.tensor_origin import Origin
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
    from upcycle.ffn.reconstruction import BlockSchedule
    from upcycle.methods.growing.base import Piece
    from upcycle.models.stock_layers import Layers

MOST_JOINT = 4096  # neurons whose down projections are fitted together


def down_file(folder: Path, layer: int) -> Path:
    """Return the file of what was refitted of a layer: ``down`` ``[E', d, F]``, and, where they were, ``gate_up`` and ``router``.

    These are ``[E', 2 F, d]`` and ``[E', d]``.
    """
    return folder / LAYER_BLUEPRINTS / f"down.{layer:05d}.safetensors"


def write_fitted(folder: Path, layer: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write what was fitted of a layer; the file appears complete or not at all."""
    from safetensors.torch import save_file

    path = down_file(folder, layer)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, partial(save_file, tensors))


def refitted_part(fitted: Mapping[str, torch.Tensor], part: str) -> torch.Tensor | None:
    """Return which of a layer's refitted tensors a stored one is: gate, up, gate_up or down; None: that was not refitted."""
    if part in ("gate", "up") and "gate_up" in fitted:
        return fitted["gate_up"].chunk(2, 1)[part == "up"]
    return fitted.get(part)


def refit_cuts(
    checkpoint: MoeCheckpoint,
    config: Mapping[str, Any],
    cuts: Mapping[int, LayerCut],
    dtype: str,
    windows: torch.Tensor,
    folder: Path,
    progress: Progress,
    pieces: Sequence[Piece] = (),
    blocks: Callable[[Origin], Iterator[torch.Tensor]] | None = None,
    training: BlockSchedule | None = None,
    seed: int = 0,
) -> dict[int, dict[str, float]]:
    """Refit every layer, and write the new down projections, or all that was trained.

    Tensors that a method made before are read from ``folder``.

    Args:
        checkpoint: the MoE before it is cut.
        config: the ``config.json`` of the result.
        cuts: what each layer's experts are made of.
        dtype: the dtype that the result is written in, as a recipe means it.
        windows: the text, token ids ``[N, W]``.
        folder: where the files are written.
        progress: where to report.
        pieces: the tensors of the result, if it is of another class than the MoE.
        blocks: reads these; None: the checkpoint does.
        training: how experts and routers are trained behind the closed form; None: they are not.
        seed: of the training's order of tokens.

    Returns:
        For every layer, what was missing of the uncut stream before and after, on held-out tokens (on all where there are fewer
        than eight windows), relative to what its experts had added, both squared; and the strength of the last fit that helped
        (0: none did).
    """
    uncut = MoeWalk(layers_of(checkpoint, dtype), windows.shape[1])
    stored_as, made = partial(stored_dtype, checkpoint, dtype), partial(made_parts, checkpoint, folder)
    layers: Layers = (
        ResultLayers(checkpoint, config, pieces, dtype, blocks)
        if pieces
        else CutLayers(uncut, config, cuts, stored_as, made)
    )
    cut = MoeWalk(layers, windows.shape[1])
    reports: dict[int, dict[str, float]] = {}

    def refit(index: int, theirs: torch.Tensor, ours: torch.Tensor) -> None:
        if index not in cuts:
            return
        fit = LayerFit(uncut, cut, index)
        down, reports[index] = fit.solve(theirs, ours)
        fitted = {"down": down.to(stored_as(index)).contiguous()}
        fit.set(fitted["down"])
        if training is not None:
            dtypes = {"router": _router_dtype(checkpoint, index, dtype)}
            fitted, found = _trained(uncut, cut, index, theirs, ours, training, seed, stored_as(index), dtypes)
            reports[index] = with_training(reports[index], found)
        write_fitted(folder, index, fitted)

    walk_both(uncut, cut, windows, refit, progress, "refitting experts")
    return reports


def with_training(report: dict[str, float], trained: Mapping[str, float]) -> dict[str, float]:
    """Return a layer's report with what :meth:`.train_cut.BlockTraining.fit` found behind the closed form."""
    found = {**report, "steps": trained["steps"]}
    if found["missing_after"] and trained["before"]:
        found["missing_after"] *= trained["after"] / trained["before"]
    return found


def _trained(
    uncut: MoeWalk,
    cut: MoeWalk,
    index: int,
    theirs: torch.Tensor,
    ours: torch.Tensor,
    schedule: BlockSchedule,
    seed: int,
    stored: torch.dtype,
    others: Mapping[str, torch.dtype],
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Train a loaded layer, and return its tensors as they are stored (``others``: those of another dtype), and the report."""
    from upcycle.calibration.compressing.train_cut import BlockTraining, trained_parts

    def rounded(name: str, part: torch.Tensor) -> torch.Tensor:
        return part.to(others.get(name, stored))

    place = cut.places[index]
    rng = stream(seed, str(index), "training")
    layer = BlockTraining(uncut, cut, index, place.block, trained_parts(place), schedule, rng)
    report = layer.fit(theirs, ours, rounded)
    return {name: rounded(name, part.detach()).contiguous().clone() for name, part in layer.parts.items()}, report


def _router_dtype(checkpoint: MoeCheckpoint, layer: int, dtype: str) -> torch.dtype:
    name = next(name for name in checkpoint.model.names[layer] if checkpoint.model.role(name) == "router")
    found: torch.dtype = getattr(torch, checkpoint.dtype_of(name, dtype))
    return found


def stored_dtype(checkpoint: MoeCheckpoint, dtype: str, layer: int) -> torch.dtype:
    """Return the dtype that the down projections of a layer's experts are written in."""
    from upcycle.architectures.stored_moe import is_down

    name = next(name for name in checkpoint.model.names[layer] if is_down(name))
    found: torch.dtype = getattr(torch, checkpoint.dtype_of(name, dtype))
    return found


class CutLayers:
    """Gives the layers of the compressed model their weights, cut out of those of a walk that holds the uncut layer."""

    def __init__(
        self,
        uncut: MoeWalk,
        config: Mapping[str, Any],
        cuts: Mapping[int, LayerCut],
        stored: Callable[[int], torch.dtype],
        made: Callable[[int], dict[str, torch.Tensor]] | None = None,
    ) -> None:
        self._uncut, self._cuts, self._stored, self._made = uncut, cuts, stored, made
        self.model: Any = empty_model(build_config(config, "config.json"), "config.json", torch.float32).eval()
        compute_buffers(self.model)
        # What is outside the layers is not cut: both models have the same tensors.
        outside = {name: part.data for name, part in uncut.model.named_parameters() if not part.is_meta}
        self.model.load_state_dict(outside, strict=False, assign=True)
        from upcycle.architectures.module_paths import module_paths_of
        from upcycle.architectures.moe_families import moe_family

        self._layers = module_paths_of(self.model.config).layers_in(self.model)
        self._clamped = moe_family(config, "config.json").clamped

    def load(self, index: int) -> None:
        """See :class:`upcycle.models.stock_layers.Layers`."""
        cut = self._cuts.get(index)
        whole = self._uncut.layers[index].state_dict()
        wanted = self._layers[index].state_dict()
        state = {
            n: t if cut is None else _cut_tensor(n, t, wanted[n].shape, cut, self._stored(index), self._clamped)
            for n, t in whole.items()
        }
        made = {} if self._made is None else self._made(index)
        self._layers[index].load_state_dict(state | made, strict=True, assign=True)
        compute_layer_buffers(self.model, index)

    def drop(self, index: int) -> None:
        """See :class:`upcycle.models.stock_layers.Layers`."""
        self._layers[index].to("meta")


def _cut_tensor(
    name: str, whole: torch.Tensor, shape: torch.Size, cut: LayerCut, stored: torch.dtype, clamped: bool
) -> torch.Tensor:
    """Return a tensor of the layer that is left; sums of experts are rounded as they will be stored."""
    of_experts = ".experts." in f".{name}"
    if whole.shape == shape and not (of_experts and cut.merges):
        return whole
    if not of_experts:
        return (whole[:, list(cut.rows)] if len(whole) == 1 else whole[list(cut.rows)]).clone()
    part = (
        "down" if name.removesuffix("_bias").endswith("down_proj") else "gate_up"
    )  # where d is 2 F, both have one shape
    if name.endswith("_bias"):
        form, which = PLAIN, f"{part}_bias"
    else:
        form, which = clamped_form(part) if clamped else PLAIN, part
    rows = [sum_of_terms(terms, which, lambda expert: form.plain(whole[expert])) for terms in cut.experts]
    made = form.stored(torch.stack(rows))
    made = made * cut.scale if part == "down" and cut.scale != 1 else made
    return made.to(stored).float() if cut.merges else made


class LayerFit:
    """Fits one layer."""

    def __init__(self, uncut: MoeWalk, cut: MoeWalk, index: int) -> None:
        self._uncut, self._cut, self._index = uncut, cut, index
        experts: Any = cut.places[index].experts
        self._experts = experts
        self._down: torch.Tensor = down_projections(experts).clone()

    def set(self, down: torch.Tensor) -> None:
        """Let the layer compute with these down projections, ``[E', d, F]``."""
        with torch.no_grad():
            set_down_projections(self._experts, down.float())

    def solve(self, theirs: torch.Tensor, ours: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the new down projections fp32 ``[E', d, F]`` for both streams ``[N, W, d]`` before the layer."""
        seen: list[Routed] = []
        missing, added = [], []
        for batch in self._uncut.batches(len(theirs)):
            whole: list[Routed] = []
            target = self._uncut.run(self._index, theirs[batch], whole.append)
            made = self._cut.run(self._index, ours[batch], seen.append)
            error = ((target - made) / self._uncut.multiplier).reshape(-1, target.shape[-1])
            if self._uncut.norm_behind(self._index) is not None:
                error = whole[0].block - seen[-1].block
            missing.append(error)
            added.append(whole[0].output.double().square().sum(1))
        return self.fit(seen, torch.cat(missing), torch.cat(added), held_out_tokens(theirs))

    def fit(
        self, seen: list[Routed], left: torch.Tensor, added: torch.Tensor, held: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Return the new down projections fp32 ``[E', d, F]``, and the report.

        Args:
            seen: what the layer's experts did.
            left: ``[T, d]``, what is missing of its output; it is changed.
            added: fp64 ``[T]``, the square of what the uncut model's experts add.
            held: boolean, ``[T]``, which tokens judge.
        """
        x, ids, weights = (torch.cat([getattr(part, name) for part in seen]) for name in ("x", "experts", "weights"))
        experts, _, width = self._down.shape
        groups = [[*range(experts)]]
        if experts * width > MOST_JOINT:
            groups = [
                [e]
                for e in torch.bincount(ids.flatten(), minlength=experts)[:experts]  # the id E' is no expert
                .argsort(descending=True, stable=True)
                .tolist()
            ]
        judged = held if bool(held.any()) else torch.ones_like(held)
        down, before = self._down.clone(), left[judged].double().square().sum().item()
        strength = 0.0
        for group in groups:
            update, tried = self._update(group, x, ids, weights, left, held)
            if update is None:
                continue
            strength = tried
            for place, expert in enumerate(group):
                own = update[:, place * width : (place + 1) * width]
                down[expert] += own
                tokens, slots = torch.where(ids == expert)
                left[tokens] -= linear(
                    active_neurons(self._experts, x[tokens], expert) * weights[tokens, slots, None], own
                )
        after = left[judged].double().square().sum().item()
        scale = added[judged].sum().item() or 1.0  # experts that add nothing leave nothing to fit
        return down, {"missing_before": before / scale, "missing_after": after / scale, "strength": strength}

    def _update(
        self,
        group: list[int],
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        left: torch.Tensor,
        held: torch.Tensor,
    ) -> tuple[torch.Tensor | None, float]:
        """Return the update ``[d, G F]`` of a group's down projections that fits what is left; None: none helps."""
        d, width = self._down.shape[1:]
        sums = RidgeSums(len(group) * width, d, torch.float32)
        for rows in torch.arange(len(x)).split(2048):
            features = torch.zeros(len(rows), len(group) * width)
            chosen = torch.zeros(len(rows), dtype=torch.bool)
            for place, expert in enumerate(group):
                tokens, slots = torch.where(ids[rows] == expert)
                chosen[tokens] = True
                part = active_neurons(self._experts, x[rows][tokens], expert) * weights[rows][tokens, slots, None]
                features[tokens, place * width : (place + 1) * width] = part
            for outside in (False, True):
                taken = chosen & (held[rows] == outside)
                if bool(taken.any()):
                    ones = torch.ones(int(taken.sum()))
                    sums.add(features[taken], left[rows][taken], ones, held_out=outside)
        choice = sums.best(REFIT_STRENGTHS)
        if not sums.finite or not choice.held_out_loss < 1:
            return None, choice.strength
        # All tokens but the held-out ones: these must go on judging.
        return sums.solve(choice.strength, everything=False).weights.T.float(), choice.strength
