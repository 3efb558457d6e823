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
from upcycle.kernels.layout.token_rows import TokenRows

# A group ends after 256 rows. It has more of one large expert, or of narrow ones whose z stays within 2^20 elements: there
# Python's own time per group outweighs what a fuller cache costs.
GROUP_ROWS = 256
GROUP_ELEMENTS = 2**20


@dataclass(frozen=True)
class Group:
    """Consecutive experts of one width, whose rows are computed together."""

    experts: tuple[int, ...]
    counts: tuple[int, ...]
    """Rows of each expert."""
    rows: slice
    """Where the group's rows are among all rows."""
    z: slice
    """Where the group's pre-activations are among z's elements."""
    width: int

    @property
    def size(self) -> int:
        """The number of rows."""
        return int(self.rows.stop - self.rows.start)


class CpuPass:
    """One forward or backward pass on a CPU: its groups and the buffers they share.

    T tokens, R rows that are not dropped, H hidden.
    """

    def __init__(self, x: torch.Tensor, weights: ExpertWeights, dispatch: Dispatch) -> None:
        """Group the experts of a pass over ``x [T, H]``."""
        self.weights, self.dispatch = weights, dispatch
        self.products = Products(x.dtype)
        self.tokens, self.x = x, x.to(self.products.sum)
        offsets = dispatch.offsets.tolist()
        self.total: int = offsets[-1]
        self.groups, self.idle, self.z_size = grouped(offsets, weights)
        self.combine = Combiner(dispatch, self.total)
        self._most_rows = max((group.size for group in self.groups), default=0)
        self._buffers: dict[str, torch.Tensor] = {}
        self.expanded = recycled(self.x, self.total, weights.hidden)
        """``[R, H]``: rows that are summed to tokens in the end."""

    def buffer(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """``[rows, columns]`` in the buffer of this name, uninitialised."""
        if name not in self._buffers or len(self._buffers[name]) < rows * columns:
            self._buffers[name] = recycled(self.x, self._most_rows * columns)
        return self._buffers[name][: rows * columns].view(rows, columns)

    def rows(self, tokens: torch.Tensor, cast: torch.Tensor, group: Group, name: str) -> TokenRows:
        """The group's rows of ``tokens [T, H]``, ``cast`` in the accumulator's dtype; the buffer of this name holds them together."""
        index = self.dispatch.row_token[group.rows]

        def gather() -> torch.Tensor:
            out = self.buffer(name, group.size, cast.shape[1])
            return torch.index_select(cast, 0, index, out=out)

        return TokenRows(tokens, index, group.counts, gather)


def grouped(offsets: list[int], weights: ExpertWeights) -> tuple[list[Group], list[int], int]:
    """The groups, the experts that have no rows, and how many elements z has."""
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
