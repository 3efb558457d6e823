"""The list of row tiles in one launch: as torch's operations it would take twenty, and more time than a few tokens' products."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["experts", "number"])
def row_tiles_kernel(
    offsets,
    tile_expert,
    tile_row,
    experts,
    number,
    BLOCK: tl.constexpr,  # rows of a tile
    EXPERTS: tl.constexpr,  # a power of two, at least as many as there are
    TILES: tl.constexpr,
):
    """``TILES`` of the ``number`` tiles: offsets int64 ``[E + 1]``; tile_expert and tile_row int32 ``[number]``."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    expert = tl.arange(0, EXPERTS)
    there = expert < experts
    start = tl.load(offsets + expert, mask=there, other=0)
    tiles = (tl.load(offsets + expert + 1, mask=there, other=0) - start + (BLOCK - 1)) // BLOCK
    ends = tl.cumsum(tiles, 0)
    before = ends - tiles
    mine = (tile[:, None] >= before[None, :]) & (tile[:, None] < ends[None, :])
    used = tl.sum(mine.to(tl.int32), 1) > 0
    found = tl.sum(tl.where(mine, expert[None, :], 0), 1)
    row = tl.sum(tl.where(mine, (start - before * BLOCK)[None, :], 0), 1) + tile * BLOCK
    inside = tile < number
    tl.store(tile_expert + tile, tl.where(used, found, -1), mask=inside)
    tl.store(tile_row + tile, tl.where(used, row, 0).to(tl.int32), mask=inside)
