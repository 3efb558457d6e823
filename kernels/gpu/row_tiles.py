"""The list of row tiles that kernels go through, made on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from upcycle.kernels.layout.dispatch import Dispatch


@dataclass(frozen=True)
class RowTiles:
    """Tiles of at most ``block`` rows, none of which crosses from one expert to the next, in the experts' order."""

    expert: torch.Tensor
    """int32 ``[N]``, -1 where unused: N is what shapes can promise."""
    row: torch.Tensor
    """int32 ``[N]``: the first row."""
    block: int

    @property
    def count(self) -> int:
        """N."""
        return self.expert.shape[0]


_CELLS = 8192  # tiles times experts that a program compares


def row_tiles(dispatch: Dispatch, block: int) -> RowTiles:
    """Cut every expert's rows into tiles without waiting for the device.

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
    """The same ``number`` of tiles from a Triton kernel."""
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
