"""What all kernels of one forward or backward pass on a GPU are given, looked up once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from upcycle.errors import UsageError
from upcycle.kernels.gpu.row_tiles import RowTiles
from upcycle.kernels.gpu.tile_table import ROWS_OF_THEIR_OWN, TILES_VARIABLE, Tile, TileTable
from upcycle.kernels.layout.dispatch import Dispatch
from upcycle.kernels.layout.expert_weights import ExpertWeights


@dataclass(frozen=True)
class GpuPass:
    """One pass over a layer of experts. T tokens, S slots, E experts, H hidden, I width of the widest expert."""

    x: torch.Tensor
    """``[T, H]``; its rows may lie apart."""
    weights: ExpertWeights
    """Contiguous."""
    dispatch: Dispatch
    scores: torch.Tensor | None
    """fp32 ``[S]`` in the slots' order; ``None``: all 1."""
    width_offsets: torch.Tensor
    """int64 ``[E + 1]`` on the device: the first neuron of every expert."""
    row_tiles: RowTiles
    table: TileTable
    kind: str
    """The part of ``table`` for this GPU."""
    precision: str
    """``tf32x3`` (three TF32 products, nearly the precision of fp32) or ``tf32``; 16-bit products ignore it."""

    @property
    def widest(self) -> int:
        """I."""
        return max(self.weights.all_widths)

    def tile(self, family: str) -> Tile:
        """The tile of a family of kernels, for as many rows as an expert has on average.

        Raises:
            UsageError: the table has none, or one that does not fit the list of row tiles.
        """
        rows = -(-self.dispatch.slots // self.dispatch.num_experts)
        tile = self.table.find(self.kind, self.x.element_size(), family, rows)
        if family not in ROWS_OF_THEIR_OWN and tile.m != self.row_tiles.block:
            raise UsageError(
                f"the table's tile of {family} has {tile.m} rows, the list of row tiles {self.row_tiles.block}",
                hint=f"every family needs the same buckets; unset {TILES_VARIABLE}, or tune again: upcycle tune-kernels",
            )
        return tile

    def rows(self, columns: int) -> torch.Tensor:
        """An uninitialised ``[S, columns]`` like ``x``."""
        return self.x.new_empty(self.dispatch.slots, columns)

    def hidden_rows(self) -> torch.Tensor:
        """An uninitialised ``h``, ``[S, I]``."""
        return self.rows(self.widest)

    def z_rows(self) -> torch.Tensor:
        """An uninitialised ``z``, ``[S, 2 I]``, or ``[S, I]`` without a gate."""
        return self.rows(self.weights.rows_per_neuron * self.widest)
