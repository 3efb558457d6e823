"""Turns a blueprint and the dense weights into the tensors of one MoE layer, piece by piece.

Nothing is built before it is asked for: a layer of eight 7B-sized copies would take two gigabytes at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from upcycle.ffn.blueprint import ZERO_NEURON, ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import Part
from upcycle.ffn.random_weights import redrawn

Matrices = Callable[[int, str], torch.Tensor]
MATRICES = ("gate", "up", "down")  # as the rows of ExpertSpec.fresh and the powers of LayerBlueprint.spread


class ExpertTensors:
    """The weights of one MoE layer, in the dtype of the dense FFN.

    Args:
        ffn: the dense layer.
        blueprint: what is made of it.
        matrices: reads gate, up or down of the FFN of a source by its index, where experts are of several.
    """

    def __init__(self, ffn: FeedForward, blueprint: LayerBlueprint, matrices: Matrices | None = None) -> None:
        self._ffn = ffn
        self._matrices = matrices
        self._blueprint = blueprint
        self._routed = [_Neurons(expert.neurons) for expert in blueprint.routed]
        shared = [expert.neurons for expert in blueprint.shared]
        # Shared experts are always summed, so every architecture stores them as one wide FFN.
        self._shared = _Neurons(torch.cat(shared)) if shared else None

    def part(self, part: Part) -> torch.Tensor:
        """Build one part: gate and up are ``[m, d]``, down is ``[d, m]``, the router ``[E, d]``."""
        ffn, dtype = self._ffn, self._ffn.gate.dtype
        if part.kind == "router":
            assert self._blueprint.router is not None
            return self._blueprint.router.to(dtype)
        if part.kind == "shared_switch":
            return torch.zeros(1, ffn.hidden_size, dtype=dtype)
        if part.kind == "zeros":
            return torch.zeros(part.size)
        if part.kind == "idle_down":
            return torch.zeros(ffn.hidden_size, part.size, dtype=dtype)
        return self._matrix(part)

    def _matrix(self, part: Part) -> torch.Tensor:
        ffn = self._ffn
        where, _, matrix = part.kind.rpartition("_")
        if where == "idle":
            return _Neurons(torch.arange(part.size)).taken(getattr(ffn, matrix), matrix)
        if where == "shared":
            return self._shared_weight(matrix, part.factor)
        factor = part.factor * self._blueprint.scale ** self._blueprint.spread[MATRICES.index(matrix)]
        return self._routed_weight(matrix, part.expert, factor)

    def _routed_weight(self, matrix: str, expert: int, factor: float) -> torch.Tensor:
        """One routed expert."""
        refitted = self._refitted("", expert) if matrix == "down" else None
        if refitted is not None:
            return _times(refitted, factor)
        return self._expert(self._routed[expert], self._blueprint.routed[expert], matrix, "routed", expert, factor)

    def _shared_weight(self, matrix: str, factor: float) -> torch.Tensor:
        """All shared experts side by side."""
        assert self._shared is not None
        refitted = self._refitted("shared", 0) if matrix == "down" else None
        if refitted is not None:
            return _times(refitted, factor)
        shared = self._blueprint.shared
        if all(spec.plain for spec in shared):
            return _times(self._shared.taken(getattr(self._ffn, matrix), matrix), factor)
        pieces = (
            self._expert(_Neurons(spec.neurons), spec, matrix, "shared", i, factor) for i, spec in enumerate(shared)
        )
        return torch.cat(list(pieces), dim=1 if matrix == "down" else 0)

    def _expert(
        self, neurons: _Neurons, spec: ExpertSpec, matrix: str, where: str, expert: int, factor: float
    ) -> torch.Tensor:
        """Its neurons of the model that it is of, with what is random in them, times all factors at once."""
        if spec.source is None:
            dense: torch.Tensor = getattr(self._ffn, matrix)
        else:
            assert self._matrices is not None
            dense = self._matrices(spec.source, matrix)
        weight = self._drawn(neurons.taken(dense, matrix), matrix, where, expert, spec)
        return _times(weight, factor * spec.scale if matrix == "down" else factor)

    def _drawn(self, weight: torch.Tensor, matrix: str, where: str, expert: int, spec: ExpertSpec) -> torch.Tensor:
        """``weight`` with what is random in it; the numbers depend on the layer's seed, the expert and the matrix alone."""
        draws = self._blueprint.draws
        relative = draws.noise if draws and where == "routed" else 0.0
        if draws is None or (spec.fresh is None and not relative and not spec.noise):
            return weight
        fresh = None if spec.fresh is None else spec.fresh[MATRICES.index(matrix)]
        if matrix == "down":
            return redrawn(weight.T, fresh, draws, relative, spec.noise, where, expert, matrix).T
        return redrawn(weight, fresh, draws, relative, spec.noise, where, expert, matrix)

    def _refitted(self, where: str, expert: int) -> torch.Tensor | None:
        """The expert's columns of the refitted down projection, where there is one."""
        if self._blueprint.down is None:
            return None
        shared, size = len(self._blueprint.shared), self._blueprint.intermediate_size
        first, count = (0, shared) if where == "shared" else (shared + expert, 1)
        return self._blueprint.down[:, first * size : (first + count) * size].to(self._ffn.down.dtype)


def _times(weight: torch.Tensor, factor: float) -> torch.Tensor:
    return weight if factor == 1.0 else weight * factor


class _Neurons:
    """A neuron list, taken by slicing where it is a run and by gathering where it is not."""

    def __init__(self, neurons: torch.Tensor) -> None:
        self._neurons = neurons
        self._zero = neurons == ZERO_NEURON if bool((neurons == ZERO_NEURON).any()) else None
        is_run = self._zero is None and bool((neurons.diff() == 1).all())
        self._run = slice(int(neurons[0]), int(neurons[-1]) + 1) if is_run else None

    def taken(self, weight: torch.Tensor, matrix: str) -> torch.Tensor:
        """Its rows of gate or up, or its columns of down."""
        return self.columns(weight) if matrix == "down" else self.rows(weight)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        if self._run is not None:
            return weight[self._run]
        taken = _take(weight, self._neurons, 0)
        if self._zero is not None:
            taken[self._zero] = 0
        return taken

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        if self._run is not None:
            return weight[:, self._run]
        taken = _take(weight, self._neurons, 1)
        if self._zero is not None:
            taken[:, self._zero] = 0
        return taken


def _take(weight: torch.Tensor, neurons: torch.Tensor, dim: int) -> torch.Tensor:
    """``index_select`` by numpy, which gathers columns twice as fast; it has no bfloat16, so words are moved as integers."""
    words = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]).numpy()
    return torch.from_numpy(words.take(neurons.clamp(min=0).numpy(), axis=dim)).view(weight.dtype)
