"""Gather, first projection and activation in one kernel: ``h = act(x[token] W_gate^T) * (x[token] W_up^T)``.

The algorithm is that of SonicMoE (https://arxiv.org/abs/2512.14080): rows are gathered while they are loaded, the activation
runs on the accumulators, and only ``z`` (the pre-activation) is kept for the backward pass, if at all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from upcycle.kernels.gpu.triton_code.activations import activation
from upcycle.kernels.gpu.triton_code.addressing import dot, offset, rounded, tile_of, width_of


@triton.jit(do_not_specialize=["tiles", "columns"])
def up_kernel(
    x,
    weight,
    bias,
    h,
    z,
    row_token,
    tile_expert,
    tile_row,
    offsets,
    width_offsets,
    tiles,
    columns,
    hidden,
    stride_x: tl.int64,
    stride_weight: tl.int64,
    stride_h: tl.int64,
    stride_z: tl.int64,
    FORM: tl.constexpr,  # "plain": z = a; "interleaved": z = g0 u0 g1 u1 ...; "concatenated": z = g0 g1 ... u0 u1 ...
    HIDDEN_LAST: tl.constexpr,  # of weight: [rows, hidden] or [hidden, rows]
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    SAVE_Z: tl.constexpr,
    ALIGNED: tl.constexpr,  # all widths are multiples of 16
    EVEN: tl.constexpr,  # hidden is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # neurons
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile ``[BLOCK_M rows, BLOCK_N neurons]`` of one expert.

    x ``[T, hidden]``; weight: experts one after another, each of ``2 I`` (or ``I``) times ``hidden``; bias in the order of
    weight's rows; h ``[R, >= I]``; z ``[R, >= 2 I]``; offsets and width_offsets int64 ``[E + 1]``. Rows past the last expert and
    columns past an expert's width are neither read nor written.
    """
    tile, column = tile_of(tl.program_id(0), tiles, columns, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    first, width = width_of(width_offsets, expert, ALIGNED)
    if column * BLOCK_N >= width:
        return
    rows = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(offsets + expert + 1)
    token = tl.load(row_token + rows, mask=live, other=0)
    k = tl.arange(0, BLOCK_K)
    x_tile = x + offset(token, stride_x)[:, None] + k[None, :]
    FACTOR: tl.constexpr = 1 if FORM == "plain" else 2
    WIDE: tl.constexpr = 2 * BLOCK_N if FORM == "interleaved" else BLOCK_N
    wide = (width * 2) if FORM == "interleaved" else width
    n = column * WIDE + tl.arange(0, WIDE)
    inside = n < wide
    # A column past the width reads another one instead: no mask in the loop, and nothing of it is stored.
    read = n % wide
    weight += offset(offset(first, FACTOR), hidden)
    if HIDDEN_LAST:
        w_tile = weight + offset(read, stride_weight)[None, :] + k[:, None]
        step = tl.full((), BLOCK_K, tl.int64)
        second = offset(width, stride_weight)
    else:
        w_tile = weight + read[None, :] + offset(k, stride_weight)[:, None]
        step = offset(tl.full((), BLOCK_K, tl.int64), stride_weight)
        second = width.to(tl.int64)
    total = tl.zeros((BLOCK_M, WIDE), tl.float32)
    total_up = tl.zeros((BLOCK_M, WIDE), tl.float32)
    for begin in range(0, hidden, BLOCK_K):
        if EVEN:
            a = tl.load(x_tile)
            b = tl.load(w_tile)
        else:
            there = begin + k < hidden
            a = tl.load(x_tile, mask=there[None, :], other=0.0)
            b = tl.load(w_tile, mask=there[:, None], other=0.0)
        total = dot(a, b, total, PRECISION)
        if FORM == "concatenated":
            if EVEN:
                b = tl.load(w_tile + second)
            else:
                b = tl.load(w_tile + second, mask=(begin + k < hidden)[:, None], other=0.0)
            total_up = dot(a, b, total_up, PRECISION)
        x_tile += BLOCK_K
        w_tile += step
    if BIAS:
        bias += offset(first, FACTOR)
        total += tl.load(bias + read).to(tl.float32)[None, :]
        if FORM == "concatenated":
            total_up += tl.load(bias + width + read).to(tl.float32)[None, :]
    if SAVE_Z:
        z_tile = z + offset(rows, stride_z)[:, None] + n[None, :]
        stored = live[:, None] & inside[None, :]
        tl.store(z_tile, rounded(total, z), mask=stored)
        if FORM == "concatenated":
            tl.store(z_tile + width, rounded(total_up, z), mask=stored)
    if FORM == "interleaved":
        gate, up = tl.split(tl.reshape(total, (BLOCK_M, BLOCK_N, 2)))
        value = activation(gate, ACTIVATION) * up
    elif FORM == "concatenated":
        value = activation(total, ACTIVATION) * total_up
    else:
        value = activation(total, ACTIVATION)
    neuron = column * BLOCK_N + tl.arange(0, BLOCK_N)
    h_tile = h + offset(rows, stride_h)[:, None] + neuron[None, :]
    tl.store(h_tile, rounded(value, h), mask=live[:, None] & (neuron < width)[None, :])
