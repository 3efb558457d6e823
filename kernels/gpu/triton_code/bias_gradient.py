"""Gradients of the experts' biases: sums over every expert's rows, in their order, zeros where it has none."""

from __future__ import annotations

import triton
import triton.language as tl

from upcycle.kernels.gpu.triton_code.addressing import offset, rounded, width_of


@triton.jit(do_not_specialize=["factor"])
def bias_gradient_kernel(
    values,
    scores,
    out,
    row_token,
    row_slot,
    offsets,
    width_offsets,
    hidden,
    factor,  # elements per neuron
    stride_values: tl.int64,
    OF_DOWN: tl.constexpr,  # values are of tokens, out [E, hidden]; else of rows, out [factor * sum of widths]
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows at a time
    BLOCK_N: tl.constexpr,
):
    """``BLOCK_N`` elements of one expert's bias: ``sum over rows of values``, of down times the rows' scores."""
    expert = tl.program_id(1)
    first, width = width_of(width_offsets, expert, False)
    if OF_DOWN:
        size = hidden
        out += offset(expert, hidden)
    else:
        size = width * factor
        out += offset(first, factor)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < size
    m = tl.arange(0, BLOCK_M)
    end = tl.load(offsets + expert + 1)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for begin in range(tl.load(offsets + expert), end, BLOCK_M):
        rows = begin + m
        live = rows < end
        read = tl.load(row_token + rows, mask=live, other=0).to(tl.int64) if OF_DOWN else rows
        at = values + offset(read, stride_values)[:, None] + n[None, :]
        value = tl.load(at, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            slot = tl.load(row_slot + rows, mask=live, other=0)
            value *= tl.load(scores + slot, mask=live, other=0.0)[:, None]
        total += tl.sum(value, 0)
    tl.store(out + n, rounded(total, out), mask=inside)
