"""Every token's sum over its rows, weighted by the router or not, in the order of its slots: no atomics, the same bits every run."""

from __future__ import annotations

import triton
import triton.language as tl

from upcycle.kernels.gpu.triton_code.addressing import offset, rounded


@triton.jit(do_not_specialize=["tokens", "top_k"])
def combine_kernel(
    values,
    scores,
    out,
    slot_row,
    token_offsets,
    tokens,
    hidden,
    top_k,
    stride_values: tl.int64,
    stride_out: tl.int64,
    FIXED: tl.constexpr,  # every token has top_k slots
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile ``[BLOCK_T tokens, BLOCK_N of hidden]`` of ``out[t] = sum over t's slots s of scores[s] * values[slot_row[s]]``.

    values ``[R, hidden]``; scores fp32 ``[S]``; slot_row int32 ``[S]``, -1 where a slot is dropped and nothing is read; a token
    without rows gets zeros. The sum is fp32.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < tokens
    if FIXED:
        first = offset(token, top_k)
        count = tl.where(live, top_k, 0)
        most = top_k
    else:
        first = tl.load(token_offsets + token, mask=live, other=0)
        count = (tl.load(token_offsets + token + 1, mask=live, other=0) - first).to(tl.int32)
        most = tl.max(count, 0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < hidden
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for number in range(0, most):
        has = number < count
        row = tl.load(slot_row + first + number, mask=has, other=-1)
        has = has & (row >= 0)
        at = values + offset(row, stride_values)[:, None] + n[None, :]
        value = tl.load(at, mask=has[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(scores + first + number, mask=has, other=0.0)[:, None]
        total += value
    tl.store(
        out + offset(token, stride_out)[:, None] + n[None, :], rounded(total, out), mask=live[:, None] & inside[None, :]
    )
