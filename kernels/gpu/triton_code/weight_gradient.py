"""Gradients of the experts' weights: ``a_e^T @ b_e`` over the rows of every expert, zeros where it has none."""

from __future__ import annotations

import triton
import triton.language as tl

from upcycle.kernels.gpu.triton_code.addressing import dot, offset, rounded, width_of


@triton.jit(do_not_specialize=["columns", "factor"])
def xty_kernel(
    a,
    b,
    out,
    row_token,
    offsets,
    width_offsets,
    columns,
    hidden,
    factor,  # columns of a per neuron
    stride_a: tl.int64,
    stride_b: tl.int64,
    stride_out: tl.int64,
    HIDDEN_LAST: tl.constexpr,  # of out: [columns of a, hidden] or [hidden, columns of a]
    GATHER: tl.constexpr,  # b has a row per token, not per row
    ACCUMULATE: tl.constexpr,
    ALIGNED: tl.constexpr,  # all widths are multiples of 16
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # rows
):
    """One tile ``[BLOCK_M columns of a, BLOCK_N of hidden]`` of one expert.

    a ``[R, >= factor I]``; b ``[T, hidden]`` with ``GATHER``, else ``[R, hidden]``; out like the weight, to which the product is
    added where ``ACCUMULATE``. Programs: column tiles of hidden, then tiles of a for the widest expert, times experts.
    """
    column = tl.program_id(0) % columns
    m = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    expert = tl.program_id(1)
    first, neurons = width_of(width_offsets, expert, ALIGNED)
    width = neurons * factor
    if (tl.program_id(0) // columns) * BLOCK_M >= width:
        return
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    m_inside, n_inside = m < width, n < hidden
    m_read, n_read = m % width, n % hidden  # what lies outside is not stored
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for begin in range(start, end, BLOCK_K):
        rows = begin + k
        live = rows < end  # rows past the last may hold anything, also NaN: they must count as zeros
        left = tl.load(a + offset(rows, stride_a)[None, :] + m_read[:, None], mask=live[None, :], other=0.0)
        if GATHER:
            rows = tl.load(row_token + rows, mask=live, other=0)
        right = tl.load(b + offset(rows, stride_b)[:, None] + n_read[None, :], mask=live[:, None], other=0.0)
        total = dot(left, right, total, PRECISION)
    out += offset(offset(first, factor), hidden)
    if HIDDEN_LAST:
        o_tile = out + offset(m, stride_out)[:, None] + n[None, :]
    else:
        o_tile = out + m[:, None] + offset(n, stride_out)[None, :]
    stored = m_inside[:, None] & n_inside[None, :]
    if ACCUMULATE:
        total += tl.load(o_tile, mask=stored, other=0.0).to(tl.float32)
    tl.store(o_tile, rounded(total, out), mask=stored)
