"""The backward pass of the activation, row by row, from ``dA = dO[token] @ W_down``, which a product kernel computed.

Three results at once (the identity is SonicMoE's, https://arxiv.org/abs/2512.14080): ``ds = sum(dA * h)`` without the expert's
output, ``dz``, and ``s * h`` for the weight's gradient. ``h`` is computed again from ``z``.

A kernel of its own, not an epilogue of the product: on an H100 tensor cores would wait for an epilogue that moves more bytes than
the product (``docs/measured/kernels_gpu.md`` has the times).
"""

from __future__ import annotations

import triton
import triton.language as tl

from upcycle.kernels.gpu.triton_code.activations import activation, activation_slope
from upcycle.kernels.gpu.triton_code.addressing import offset, rounded, width_of


@triton.jit(do_not_specialize=["hidden"])
def activation_backward_kernel(
    grad,
    bias,
    h,
    z,
    dz,
    scores,
    dscores,
    row_token,
    row_slot,
    tile_expert,
    tile_row,
    offsets,
    width_offsets,
    hidden,
    stride_grad: tl.int64,
    stride_h: tl.int64,
    stride_z: tl.int64,
    FORM: tl.constexpr,  # of z and dz, as in up_kernel
    ACTIVATION: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIAS: tl.constexpr,  # of the down projection, [E, hidden]
    ALIGNED: tl.constexpr,  # all widths are multiples of 16
    ROWS: tl.constexpr,  # of a row tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # neurons
):
    """``BLOCK_M`` rows of a row tile, all neurons of their expert.

    h ``[R, >= I]``: dA on entry, ``s * h`` afterwards; z and dz ``[R, >= 2 I]``, which may be one tensor; grad ``[T, hidden]`` is read
    only for a bias' share of ds; scores and dscores fp32 ``[S]``. Programs: the parts of a row tile, times row tiles.
    """
    PARTS: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    tile = tl.program_id(0) // PARTS
    expert = tl.load(tile_expert + tile)
    if expert < 0:
        return
    _, width = width_of(width_offsets, expert, ALIGNED)
    rows = tl.load(tile_row + tile) + (tl.program_id(0) % PARTS) * BLOCK_M + tl.arange(0, BLOCK_M)
    end = tl.load(offsets + expert + 1)
    live = rows < end
    z_row = offset(rows, stride_z)[:, None]
    h_row = offset(rows, stride_h)[:, None]
    if WEIGHTED:
        slot = tl.load(row_slot + rows, mask=live, other=0)
        score = tl.load(scores + slot, mask=live, other=0.0)[:, None]
        share = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(0, width, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        stored = live[:, None] & (n < width)[None, :]
        dh = tl.load(h + h_row + n[None, :], mask=stored, other=0.0).to(tl.float32)
        if FORM == "interleaved":
            pair = begin * 2 + tl.arange(0, 2 * BLOCK_N)
            both = live[:, None] & (pair < 2 * width)[None, :]
            pairs = tl.load(z + z_row + pair[None, :], mask=both, other=0.0).to(tl.float32)
            gate, up = tl.split(tl.reshape(pairs, (BLOCK_M, BLOCK_N, 2)))
        else:
            gate = tl.load(z + z_row + n[None, :], mask=stored, other=0.0).to(tl.float32)
            if FORM == "concatenated":
                up = tl.load(z + z_row + width + n[None, :], mask=stored, other=0.0).to(tl.float32)
        # What other threads of the program still have to read is overwritten below.
        tl.debug_barrier()
        active = activation(gate, ACTIVATION)
        value = active if FORM == "plain" else active * up
        if WEIGHTED:
            share += tl.sum(dh * value, 1)
            dh = dh * score
            value = value * score
        tl.store(h + h_row + n[None, :], rounded(value, h), mask=stored)
        slope = activation_slope(gate, ACTIVATION)
        if FORM == "interleaved":
            pairs = tl.reshape(tl.join(dh * up * slope, dh * active), (BLOCK_M, 2 * BLOCK_N))
            tl.store(dz + z_row + pair[None, :], rounded(pairs, dz), mask=both)
        elif FORM == "concatenated":
            tl.store(dz + z_row + n[None, :], rounded(dh * up * slope, dz), mask=stored)
            tl.store(dz + z_row + width + n[None, :], rounded(dh * active, dz), mask=stored)
        else:
            tl.store(dz + z_row + n[None, :], rounded(dh * slope, dz), mask=stored)
    if WEIGHTED:
        if BIAS:
            token = tl.load(row_token + rows, mask=live, other=0)
            for begin in range(0, hidden, BLOCK_N):
                k = begin + tl.arange(0, BLOCK_N)
                there = live[:, None] & (k < hidden)[None, :]
                seen = tl.load(grad + offset(token, stride_grad)[:, None] + k[None, :], mask=there, other=0.0)
                added = tl.load(bias + offset(expert, hidden) + k, mask=k < hidden, other=0.0)
                share += tl.sum(seen.to(tl.float32) * added.to(tl.float32)[None, :], 1)
        tl.store(dscores + slot, share, mask=live)
