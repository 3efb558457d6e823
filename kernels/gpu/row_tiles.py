"""The list of row tiles that kernels work through, made on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from upcycle.kernels.layout.dispatch import Dispatch


@dataclass(frozen=True)
class RowTiles:
    """Tiles of at most ``block`` rows in the experts' order; none holds rows of two experts."""

    expert: torch.Tensor
    """int32 ``[N]``: the expert of every tile, -1 where a tile is unused. N follows from shapes alone."""
    row: torch.Tensor
    """int32 ``[N]``: the first row of every tile."""
    block: int

    @property
    def count(self) -> int:
        """N, the number of tiles."""
        return self.expert.shape[0]


_CELLS = 8192  # how many pairs of a tile and an expert one program compares


def row_tiles(dispatch: Dispatch, block: int) -> RowTiles:
    """Every expert's rows cut into tiles, without waiting for the device.

    ``N = min(ceil(S / block) + E, S)``: every expert has at most one tile that is not full, and no tile is empty.
    """
    number = min(-(-dispatch.slots // block) + dispatch.num_experts, dispatch.slots)
    if dispatch.offsets.device.type == "cuda":
        return in_one_launch(dispatch, block, number)
    starts = dispatch.offsets[:-1]
    ends = ((dispatch.offsets.diff() + block - 1) // block).cumsum(0)
    tile = torch.arange(number, device=ends.device)
    expert = torch.searchsorted(ends, tile, right=True)
    used = expert < dispatch.num_experts
    held = expert.clamp(max=dispatch.num_experts - 1)
    # The tiles of earlier experts come first: an expert's end of tiles less its own number of them.
    before = torch.cat([ends.new_zeros(1), ends])[held]
    row = starts[held] + (tile - before) * block
    return RowTiles(torch.where(used, expert, -1).int(), torch.where(used, row, 0).int(), block)


def in_one_launch(dispatch: Dispatch, block: int, number: int) -> RowTiles:
    """What :func:`row_tiles` returns, ``number`` tiles, from a single Triton kernel."""
    from upcycle.kernels.gpu.triton_code.row_tiles import row_tiles_kernel

    made = torch.empty(2, number, dtype=torch.int32, device=dispatch.offsets.device)
    experts = 1 << (dispatch.num_experts - 1).bit_length()
    tiles = max(1, _CELLS // experts)
    if number:
        row_tiles_kernel[(-(-number // tiles),)](
            dispatch.offsets,
            made[0],
            made[1],
            dispatch.num_experts,
            number,
            BLOCK=block,
            EXPERTS=experts,
            TILES=tiles,
        )
    return RowTiles(made[0], made[1], block)
