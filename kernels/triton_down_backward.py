"""The backward pass of the down projection and the activation in one kernel.

From one accumulator, ``dA = dO[token] @ W_down``, come all three results (the identity is SonicMoE's,
https://arxiv.org/abs/2512.14080): ``ds = sum(dA * h)`` without the expert's output, ``dz``, and ``s * h`` for the weight's
gradient. ``h`` is computed again from ``z``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from upcycle.kernels.triton_activations import activation, activation_slope
from upcycle.kernels.triton_common import dot, offset, rounded, tile_of, width_of


@triton.jit(do_not_specialize=["tiles", "columns"])
def down_backward_kernel(
    grad,
    weight,
    bias,
    z,
    scores,
    dz,
    scaled_h,
    partial,
    row_token,
    row_slot,
    tile_expert,
    tile_row,
    offsets,
    width_offsets,
    tiles,
    columns,
    hidden,
    stride_grad: tl.int64,
    stride_weight: tl.int64,
    stride_z: tl.int64,
    stride_h: tl.int64,
    FORM: tl.constexpr,  # of z and dz, as in up_kernel
    HIDDEN_LAST: tl.constexpr,  # of weight: [neurons, hidden] or [hidden, neurons]
    ACTIVATION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIAS: tl.constexpr,  # of the down projection, [E, hidden]
    ALIGNED: tl.constexpr,  # all widths are multiples of 16
    EVEN: tl.constexpr,  # hidden is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # neurons
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile ``[BLOCK_M rows, BLOCK_N neurons]``.

    grad ``[T, hidden]``; z and dz ``[R, >= 2 I]``; scaled_h ``[R, >= I]``; scores fp32 ``[S]``; partial fp32 ``[R, columns]``: the
    share of every column of tiles in ``ds``, 0 past an expert's width, added up afterwards in their order.
    """
    tile, column = tile_of(tl.program_id(0), tiles, columns, GROUP)
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    first, width = width_of(width_offsets, expert, ALIGNED)
    rows = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)
    live = rows < tl.load(offsets + expert + 1)
    if column * BLOCK_N >= width:
        if WEIGHTED:
            tl.store(partial + offset(rows, columns) + column, tl.zeros((BLOCK_M,), tl.float32), mask=live)
        return
    token = tl.load(row_token + rows, mask=live, other=0)
    k = tl.arange(0, BLOCK_K)
    g_tile = grad + offset(token, stride_grad)[:, None] + k[None, :]
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    read = n % width
    weight += offset(first, hidden)
    if HIDDEN_LAST:
        w_tile = weight + offset(read, stride_weight)[None, :] + k[:, None]
        step = tl.full((), BLOCK_K, tl.int64)
    else:
        w_tile = weight + read[None, :] + offset(k, stride_weight)[:, None]
        step = offset(tl.full((), BLOCK_K, tl.int64), stride_weight)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    of_bias = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(0, hidden, BLOCK_K):
        if EVEN:
            a = tl.load(g_tile)
            b = tl.load(w_tile)
        else:
            there = begin + k < hidden
            a = tl.load(g_tile, mask=there[None, :], other=0.0)
            b = tl.load(w_tile, mask=there[:, None], other=0.0)
        total = dot(a, b, total, PRECISION)
        if BIAS and WEIGHTED:
            added = tl.load(bias + offset(expert, hidden) + begin + k, mask=begin + k < hidden, other=0.0)
            of_bias += tl.sum(a.to(tl.float32) * added.to(tl.float32)[None, :], 1)
        g_tile += BLOCK_K
        w_tile += step
    stored = live[:, None] & inside[None, :]
    z_row = offset(rows, stride_z)[:, None]
    if FORM == "interleaved":
        pair = column * (2 * BLOCK_N) + tl.arange(0, 2 * BLOCK_N)
        both = live[:, None] & (pair < 2 * width)[None, :]
        pairs = tl.load(z + z_row + pair[None, :], mask=both, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(pairs, (BLOCK_M, BLOCK_N, 2)))
    else:
        gate = tl.load(z + z_row + n[None, :], mask=stored, other=0.0).to(tl.float32)
        if FORM == "concatenated":
            up = tl.load(z + z_row + width + n[None, :], mask=stored, other=0.0).to(tl.float32)
    active = activation(gate, ACTIVATION)
    h = active if FORM == "plain" else active * up
    dh = total
    if WEIGHTED:
        score = tl.load(scores + tl.load(row_slot + rows, mask=live, other=0), mask=live, other=0.0)
        # Columns past the width hold another neuron's product.
        share = tl.sum(tl.where(inside[None, :], total * h, 0.0), 1)
        if BIAS:
            share += tl.where(column == 0, of_bias, 0.0)
        tl.store(partial + offset(rows, columns) + column, share, mask=live)
        dh = total * score[:, None]
        h = h * score[:, None]
    tl.store(scaled_h + offset(rows, stride_h)[:, None] + n[None, :], rounded(h, scaled_h), mask=stored)
    slope = activation_slope(gate, ACTIVATION)
    if FORM == "interleaved":
        pairs = tl.reshape(tl.join(dh * up * slope, dh * active), (BLOCK_M, 2 * BLOCK_N))
        tl.store(dz + z_row + pair[None, :], rounded(pairs, dz), mask=both)
    elif FORM == "concatenated":
        tl.store(dz + z_row + n[None, :], rounded(dh * up * slope, dz), mask=stored)
        tl.store(dz + z_row + width + n[None, :], rounded(dh * active, dz), mask=stored)
    else:
        tl.store(dz + z_row + n[None, :], rounded(dh * slope, dz), mask=stored)
