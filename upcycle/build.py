"""Turns a blueprint and the dense weights into the tensors of one MoE layer, piece by piece.

Nothing is built before it is asked for: a layer of eight 7B-sized copies would take two gigabytes at once.
"""

from __future__ import annotations

import torch

from upcycle.blueprint import ZERO_NEURON, LayerBlueprint
from upcycle.feed_forward import FeedForward
from upcycle.targets.base import Part


class ExpertTensors:
    """The weights of one MoE layer, in the dtype of the dense FFN."""

    def __init__(self, ffn: FeedForward, blueprint: LayerBlueprint) -> None:
        self._ffn = ffn
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
        if part.kind == "idle_down":
            return torch.zeros(ffn.hidden_size, part.size, dtype=dtype)
        where, _, matrix = part.kind.rpartition("_")
        if where == "idle":
            neurons = _Neurons(torch.arange(part.size))
        elif where == "shared":
            assert self._shared is not None
            neurons = self._shared
        else:
            neurons = self._routed[part.expert]
        if matrix != "down":
            return neurons.rows(ffn.gate if matrix == "gate" else ffn.up)
        factor = part.factor * (1.0 if where == "shared" else self._blueprint.scale)
        columns = self._refitted(where, part.expert)
        if columns is None:
            columns = neurons.columns(ffn.down)
        return columns if factor == 1.0 else columns * factor

    def _refitted(self, where: str, expert: int) -> torch.Tensor | None:
        """The expert's columns of the refitted down projection, where there is one."""
        if self._blueprint.down is None:
            return None
        shared, size = len(self._blueprint.shared), self._blueprint.intermediate_size
        first, count = (0, shared) if where == "shared" else (shared + expert, 1)
        return self._blueprint.down[:, first * size : (first + count) * size].to(self._ffn.down.dtype)


class _Neurons:
    """A neuron list, taken by slicing where it is a run and by gathering where it is not."""

    def __init__(self, neurons: torch.Tensor) -> None:
        self._neurons = neurons
        self._zero = neurons == ZERO_NEURON if bool((neurons == ZERO_NEURON).any()) else None
        is_run = self._zero is None and bool((neurons.diff() == 1).all())
        self._run = slice(int(neurons[0]), int(neurons[-1]) + 1) if is_run else None

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
