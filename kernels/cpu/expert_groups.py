"""How one pass on a CPU goes over experts: in groups that share a gather and an activation, with buffers that are reused."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from upcycle.kernels.cpu.combine import Combiner
from upcycle.kernels.cpu.products import Products
from upcycle.kernels.cpu.recycled_memory import recycled
from upcycle.kernels.layout.dispatch import Dispatch
from upcycle.kernels.layout.expert_weights import ExpertWeights

GROUP_ROWS = 256  # as many rows are computed together, more only of a larger expert,
GROUP_ELEMENTS = (
    2**20
)  # or of narrow experts: while z has at most so many elements (Python costs more than a full cache)


@dataclass(frozen=True)
class Group:
    """Consecutive experts of one width, whose rows are computed together."""

    experts: tuple[int, ...]
    counts: tuple[int, ...]
    """How many rows each has."""
    rows: slice
    """Theirs among all rows."""
    z: slice
    """Among z's elements."""
    width: int

    @property
    def size(self) -> int:
        """How many rows."""
        return int(self.rows.stop - self.rows.start)


class Pass:
    """What the groups of one pass share. T tokens, R rows that are not dropped, H hidden."""

    def __init__(self, x: torch.Tensor, weights: ExpertWeights, dispatch: Dispatch) -> None:
        """Of ``x [T, H]``; reads the offsets, which are on the CPU as everything else is."""
        self.weights, self.dispatch = weights, dispatch
        self.products = Products(x.dtype)
        self.x = x.to(self.products.sum)
        offsets = dispatch.offsets.tolist()
        self.total: int = offsets[-1]
        self.groups, self.idle, self.z_size = grouped(offsets, weights)
        self.combine = Combiner(dispatch, self.total)
        self._most_rows = max((group.size for group in self.groups), default=0)
        self._buffers: dict[str, torch.Tensor] = {}
        self.expanded = recycled(self.x, self.total, weights.hidden)
        """``[R, H]``: what is to be summed to tokens."""

    def buffer(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """``[rows, columns]`` of the buffer of this name, with whatever it held."""
        if name not in self._buffers or len(self._buffers[name]) < rows * columns:
            self._buffers[name] = recycled(self.x, self._most_rows * columns)
        return self._buffers[name][: rows * columns].view(rows, columns)

    def gather(self, tokens: torch.Tensor, group: Group, name: str) -> torch.Tensor:
        """The group's rows of ``[T, H]``, in the buffer of this name."""
        out = self.buffer(name, group.size, tokens.shape[1])
        return torch.index_select(tokens, 0, self.dispatch.row_token[group.rows], out=out)


def grouped(offsets: list[int], weights: ExpertWeights) -> tuple[list[Group], list[int], int]:
    """The groups, the experts without rows, and the elements of z."""
    groups: list[Group] = []
    idle: list[int] = []
    pending: list[int] = []
    z_end = 0
    for expert, (first, last) in enumerate(pairwise(offsets)):
        if first == last:
            idle.append(expert)
            continue
        unlike = pending and weights.width(pending[0]) != weights.width(expert)
        most = max(GROUP_ROWS, GROUP_ELEMENTS // (weights.width(expert) * weights.rows_per_neuron))
        if pending and (unlike or last - offsets[pending[0]] > most):
            groups.append(_group(pending, offsets, weights, z_end))
            z_end, pending = groups[-1].z.stop, []
        pending.append(expert)
    if pending:
        groups.append(_group(pending, offsets, weights, z_end))
        z_end = groups[-1].z.stop
    return groups, idle, z_end


def _group(experts: list[int], offsets: list[int], weights: ExpertWeights, z_start: int) -> Group:
    start, stop = offsets[experts[0]], offsets[experts[-1] + 1]
    width = weights.width(experts[0])
    counts = tuple(offsets[expert + 1] - offsets[expert] for expert in experts)
    z_stop = z_start + (stop - start) * width * weights.rows_per_neuron
    return Group(tuple(experts), counts, slice(start, stop), slice(z_start, z_stop), width)
