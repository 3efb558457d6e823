"""Rows times the matrix of their expert: the down projection, and the input gradients of all rows from ``dz``."""

from __future__ import annotations

import triton
import triton.language as tl

from upcycle.kernels.gpu.triton_code.addressing import dot, offset, rounded, tile_of, width_of


@triton.jit(do_not_specialize=["tiles", "columns", "factor"])
def gemm_kernel(
    a,
    weight,
    out,
    bias,
    tile_expert,
    tile_row,
    offsets,
    width_offsets,
    tiles,
    columns,
    hidden,
    factor,  # rows of weight per neuron
    stride_a: tl.int64,
    stride_weight: tl.int64,
    stride_out: tl.int64,
    HIDDEN_LAST: tl.constexpr,  # of weight: [rows, hidden] or [hidden, rows]
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,  # every expert's rows of weight are a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile ``[BLOCK_M rows, BLOCK_N of hidden]`` of ``out = a @ weight_e``, ``a`` ``[R, >= factor I]``, out ``[R, hidden]``.

    ``bias`` ``[E, hidden]`` is added where ``BIAS``. offsets and width_offsets int64 ``[E + 1]``.
    """
    tile, column = tile_of(tl.program_id(0), tiles, columns, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    first, width = width_of(width_offsets, expert, False)
    depth = width * factor
    rows = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(offsets + expert + 1)
    # Rows past the expert's last read its first one, columns past hidden another one: what they compute is not stored.
    read_row = tl.where(live, rows, tl.load(tile_row + tile))
    k = tl.arange(0, BLOCK_K)
    a_tile = a + offset(read_row, stride_a)[:, None] + k[None, :]
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < hidden
    read = n % hidden
    weight += offset(offset(first, factor), hidden)
    if HIDDEN_LAST:
        w_tile = weight + offset(k, stride_weight)[:, None] + read[None, :]
        step = offset(tl.full((), BLOCK_K, tl.int64), stride_weight)
    else:
        w_tile = weight + k[:, None] + offset(read, stride_weight)[None, :]
        step = tl.full((), BLOCK_K, tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(0, depth, BLOCK_K):
        if EVEN:
            left = tl.load(a_tile)
            right = tl.load(w_tile)
        else:
            there = begin + k < depth
            left = tl.load(a_tile, mask=there[None, :], other=0.0)
            right = tl.load(w_tile, mask=there[:, None], other=0.0)
        total = dot(left, right, total, PRECISION)
        a_tile += BLOCK_K
        w_tile += step
    if BIAS:
        total += tl.load(bias + offset(expert, hidden) + read).to(tl.float32)[None, :]
    o_tile = out + offset(rows, stride_out)[:, None] + n[None, :]
    tl.store(o_tile, rounded(total, out), mask=live[:, None] & inside[None, :])
