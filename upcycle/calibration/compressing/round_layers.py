"""Rounds the matrices of a Mixture-of-Experts to few bits, layer by layer, on the stream that the rounded layers below leave.

Every linear layer sees its own inputs, and every expert those of the tokens that chose it, each counted by its squared weight:
that is what an error of the expert weighs in the layer's output. Down projections see the activations of the rounded neurons. One
window in eight judges between GPTQ and nearest rounding (:func:`upcycle.precision.gptq.best_rounding`).

T tokens, E experts, K per token, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from upcycle.calibration.compressing.made_parts import held_out_tokens
from upcycle.calibration.compressing.moe_walk import MoeWalk, Routed
from upcycle.files.atomic_files import write_whole
from upcycle.files.formats.packed_bits import pack_rows
from upcycle.files.formats.packed_folder import PACKED, SCALE, SHAPE
from upcycle.files.output.workspace import LAYER_BLUEPRINTS
from upcycle.models.stock_layers import Layers
from upcycle.precision.gptq import LEAST_TOKENS, best_rounding
from upcycle.precision.grid import NumberGrid, Rounded, to_nearest
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.planning.precision.scheme import Matrix

_MANY_BITS = 8  # from here on, nearest rounding leaves nothing to make up for
_ROWS = 2048


def bits_file(folder: Path, layer: int) -> Path:
    """Return the file with the rounded matrices of a layer, by their stored names."""
    return folder / LAYER_BLUEPRINTS / f"bits.{layer:05d}.safetensors"


@dataclass(frozen=True)
class Moments:
    """Second moments ``[C, C]`` of a matrix' inputs: on the tokens that fit, and on those that judge (None: there are none)."""

    seen: torch.Tensor
    held_out: torch.Tensor | None
    tokens: int

    @classmethod
    def of(cls, inputs: torch.Tensor, held: torch.Tensor, weights: torch.Tensor | None = None) -> Moments:
        """Return those of inputs ``[t, C]``, of which ``held`` ``[t]`` judge; ``weights`` ``[t]`` multiply them."""
        inputs = inputs if weights is None else inputs * weights[:, None]
        if int((~held).sum()) < LEAST_TOKENS or int(held.sum()) < 1:
            return cls(_gram(inputs), None, len(inputs))
        return cls(_gram(inputs[~held]), _gram(inputs[held]), int((~held).sum()))


def _gram(inputs: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for rows in inputs.split(_ROWS):
        total += (rows.T @ rows).double()
    return total


def round_layers(
    layers: Layers,
    matrices: Mapping[int, Sequence[Matrix]],
    windows: torch.Tensor | None,
    gptq: bool,
    folder: Path,
    progress: Progress,
) -> dict[int, dict[str, Any]]:
    """Round every layer, and write a file of its matrices.

    Args:
        layers: the model before it is rounded.
        matrices: those that are rounded, by layer.
        windows: the text, token ids ``[N, W]``; None: everything is rounded to the nearest.
        gptq: whether GPTQ rounds matrices of fewer than eight bits.
        folder: where the files are written.
        progress: where to report.

    Returns:
        For every layer, ``matrices``: how many were rounded, ``gptq``: how many of them by GPTQ, ``few``: how many experts saw too
        few tokens for that, and ``error``: the squared change of the layer's output, relative to what the layer adds to the stream.
    """
    (folder / LAYER_BLUEPRINTS).mkdir(exist_ok=True)
    reports: dict[int, dict[str, Any]] = {}
    with progress.phase("rounding weights", len(matrices)):
        if windows is None or not gptq:
            walk = MoeWalk(layers, 8)
            for index, own in matrices.items():
                with walk.loaded(index):
                    layer = _Layer(walk, index, own)
                    layer.round_all({}, None, gptq=False)
                    layer.write(folder)
                    reports[index] = layer.report
                progress.advance()
            return reports
        walk = MoeWalk(layers, windows.shape[1])
        stream = torch.cat([walk.embed(windows[batch]) for batch in walk.batches(len(windows))])
        for index in range(len(walk.layers)):
            with walk.loaded(index):
                if index in matrices:
                    layer = _Layer(walk, index, matrices[index])
                    layer.round_on(stream)
                    layer.write(folder)
                    reports[index] = layer.report
                for batch in walk.batches(len(windows)):
                    stream[batch] = walk.run(index, stream[batch])
            progress.advance()
    return reports


ExpertInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The inputs ``[t, d]`` of the tokens that chose an expert, which of them judge ``[t]``, and the expert's weights ``[t]``."""


def rounded_expert(
    weights: Mapping[str, torch.Tensor],
    activation: Callable[[torch.Tensor], torch.Tensor],
    grids: Mapping[str, NumberGrid],
    inputs: ExpertInputs | None,
) -> dict[str, tuple[Rounded, bool]]:
    """Round gate and up ``[F, d]`` and then down ``[d, F]`` of one expert; each with whether GPTQ did it.

    Args:
        weights: the matrices.
        activation: of the gate.
        grids: what each is rounded to.
        inputs: of the expert; None: everything is rounded to the nearest.
    """
    moments = None if inputs is None else Moments.of(*inputs)
    # Gate and up have the same inputs, so that they are rounded as one matrix.
    joint, better = _by_moments(torch.cat([weights["gate"], weights["up"]]).detach(), moments, grids["gate"])
    halves = zip(*(part.chunk(2) for part in joint), strict=True)
    made = {part: (Rounded(*half), better) for part, half in zip(("gate", "up"), halves, strict=True)}
    active = None
    if inputs is not None:
        gate, up = (linear(inputs[0], made[part][0].means) for part in ("gate", "up"))
        active = Moments.of(activation(gate) * up, *inputs[1:])
    return {**made, "down": _by_moments(weights["down"].detach(), active, grids["down"])}


def _by_moments(weight: torch.Tensor, moments: Moments | None, grid: NumberGrid) -> tuple[Rounded, bool]:
    if moments is None or not 0 < grid.bits < _MANY_BITS:
        return to_nearest(weight, grid), False
    return best_rounding(weight, moments.seen, moments.held_out, moments.tokens, grid)


class _Layer:
    """Rounds one loaded layer, in place."""

    def __init__(self, walk: MoeWalk, index: int, matrices: Sequence[Matrix]) -> None:
        self._walk, self._index, self._module = walk, index, walk.layers[index]
        self._linear = {matrix.module: matrix for matrix in matrices if matrix.module}
        self._experts: dict[int, dict[str, Matrix]] = {}
        for matrix in matrices:
            if not matrix.module:
                self._experts.setdefault(matrix.expert, {})[matrix.part] = matrix
        self._made: dict[str, tuple[Matrix, Rounded]] = {}
        self.report: dict[str, Any] = {"matrices": 0, "gptq": 0, "few": 0, "error": None}

    def round_on(self, stream: torch.Tensor) -> None:
        """Round everything for the stream ``[N, W, d]`` before the layer."""
        held = held_out_tokens(stream)
        before = self._outputs(stream)
        inputs = self._inputs(stream, held)
        self.round_all(inputs, None, gptq=True)
        if self._experts:
            seen: list[Routed] = []
            for batch in self._walk.batches(len(stream)):
                self._walk.run(self._index, stream[batch], seen.append)
            self.round_all({}, RoutedTexts(seen, held), gptq=True)
        after = self._outputs(stream)
        added = (before - stream).double().square().sum().item() or 1.0
        self.report["error"] = (after - before).double().square().sum().item() / added

    def _outputs(self, stream: torch.Tensor) -> torch.Tensor:
        batches = self._walk.batches(len(stream))
        return torch.cat([self._walk.run(self._index, stream[batch]) for batch in batches])

    def _inputs(self, stream: torch.Tensor, held: torch.Tensor) -> dict[str, Moments]:
        """Return the moments of what linear layers of few bits read."""
        few = [name for name, matrix in self._linear.items() if 0 < matrix.grid.bits < _MANY_BITS]
        if not few:
            return {}
        sums: dict[str, list[torch.Tensor]] = {}
        place = 0

        def add(name: str, _: Any, given: tuple[torch.Tensor, ...]) -> None:
            flat = given[0].reshape(-1, given[0].shape[-1])
            own = held[place : place + len(flat)]
            grams = [_gram(flat[~own]), _gram(flat[own])]
            sums[name] = [a + b for a, b in zip(sums[name], grams, strict=True)] if name in sums else grams

        handles = [self._module.get_submodule(n).register_forward_pre_hook(partial(add, n)) for n in few]
        try:
            for batch in self._walk.batches(len(stream)):
                self._walk.run(self._index, stream[batch])
                place += stream[batch].shape[0] * stream.shape[1]
        finally:
            for handle in handles:
                handle.remove()
        count = int((~held).sum())
        return {name: Moments(seen, other if bool(held.any()) else None, count) for name, (seen, other) in sums.items()}

    def round_all(self, inputs: Mapping[str, Moments], chosen: RoutedTexts | None, gptq: bool) -> None:
        """Round linear layers, given the moments of the inputs of those in few bits; then (``chosen``, or no GPTQ) experts."""
        for name, matrix in self._linear.items():
            if matrix.name not in self._made:
                weight = self._module.get_submodule(name).weight
                self._take(matrix, weight, self._rounded(weight, inputs.get(name), matrix))
        if gptq and chosen is None:
            return
        experts: Any = self._walk.places[self._index].experts if self._experts else None
        for expert, parts in self._experts.items():
            width = experts.gate_up_proj.shape[1] // 2
            places = {
                "gate": experts.gate_up_proj[expert][:width],
                "up": experts.gate_up_proj[expert][width:],
                "down": experts.down_proj[expert],
            }
            x = None if chosen is None else chosen.of(expert)
            grids = {part: matrix.grid for part, matrix in parts.items()}
            self.report["few"] += x is not None and len(x[0]) < LEAST_TOKENS
            for part, (made, better) in rounded_expert(places, experts.act_fn, grids, x).items():
                self._take(parts[part], places[part], made)
                self.report["gptq"] += better

    def _rounded(self, weight: torch.Tensor, moments: Moments | None, matrix: Matrix) -> Rounded:
        made, better = _by_moments(weight.detach(), moments, matrix.grid)
        self.report["gptq"] += better
        return made

    def _take(self, matrix: Matrix, weight: torch.Tensor, made: Rounded) -> None:
        """Let the layer compute with a rounded matrix."""
        with torch.no_grad():
            weight.copy_(made.means)
        self._made[matrix.name] = matrix, made
        self.report["matrices"] += 1

    def write(self, folder: Path) -> None:
        """Write the layer's matrices, as they will be stored."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        for name, (matrix, made) in self._made.items():
            if matrix.grid.bits:
                tensors[name + PACKED] = pack_rows(made.values, matrix.grid.bits)
                tensors[name + SHAPE] = torch.tensor(matrix.shape)
            else:
                tensors[name] = made.values
            tensors[name + SCALE] = made.scales
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_whole(bits_file(folder, self._index), partial(save_file, whole))


class RoutedTexts:
    """Gives the inputs of each expert.

    Args:
        seen: what the layer did, batch by batch.
        held: which tokens judge, ``[T]``.
    """

    def __init__(self, seen: Iterable[Routed], held: torch.Tensor) -> None:
        parts = list(seen)
        self._x, self._ids, self._weights = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("x", "experts", "weights")
        )
        self._held = held

    def of(self, expert: int) -> ExpertInputs:
        """Return the inputs of an expert."""
        tokens, slots = torch.where(self._ids == expert)
        return self._x[tokens], self._held[tokens], self._weights[tokens, slots]
