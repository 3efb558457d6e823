"""A whole pass of tokens through small bf16 experts in one call, ``tile_pass.cpp``, on CPUs with tiles (AMX)."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator
from itertools import pairwise
from operator import mul
from typing import NamedTuple

import torch

from upcycle.kernels.cpu.fused_activations import FUSED_CODES
from upcycle.kernels.cpu.native.compile import Function, function
from upcycle.kernels.cpu.native.tile_products import LARGEST_TILED
from upcycle.kernels.cpu.recycled_memory import recycled
from upcycle.kernels.layout.dispatch import Dispatch
from upcycle.kernels.layout.expert_weights import ExpertWeights
from upcycle.kernels.layout.plain_memory import is_plain

SIDE, DEPTH = 16, 32  # rows of a tile, and numbers that it sums over
_ARGUMENTS = (
    *[ctypes.c_int] * 2,
    *[ctypes.c_void_p, ctypes.c_int64] * 2,
    ctypes.c_int64,
    *[ctypes.c_void_p] * 2,
    ctypes.c_int64,
    *[ctypes.c_int] * 2,
    *[ctypes.c_void_p] * 2,
    ctypes.c_int,
)


class _Matrices(NamedTuple):
    """Where a kernel finds matrices ``[outputs, inputs]``."""

    stride: int
    """Of the dimension that is not contiguous."""
    turned: bool
    """Whether inputs are contiguous."""


def tile_pass() -> Function | None:
    """``upcycle_tile_pass`` of ``tile_pass.cpp``; ``None`` where there are no tiles, or where it cannot be compiled."""
    if not torch.cpu._is_amx_tile_supported():
        return None
    return function("tile_pass", "16-bit experts", _ARGUMENTS)


def tiled_pass(
    x: torch.Tensor, weights: ExpertWeights, dispatch: Dispatch, scores: torch.Tensor | None, keep: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Output and z, as :class:`upcycle.kernels.layout.expert_weights.Backend` gives them; ``None`` where there is no kernel for it.

    There is one for bf16 experts without biases, of at most ``LARGEST_TILED`` elements per matrix.
    """
    if x.dtype != torch.bfloat16 or weights.up_bias is not None or weights.down_bias is not None:
        return None
    code, index = FUSED_CODES.get(weights.activation), dispatch.row_token
    widest = max(weights.all_widths, default=0)
    if code is None or weights.rows_per_neuron * widest * weights.hidden > LARGEST_TILED or index.dtype != torch.int32:
        return None
    up, down = _layout(weights)
    if up is None or down is None or x.stride(-1) != 1 or not is_plain(x, weights.up, weights.down, scores, index):
        return None
    if (run := tile_pass()) is None:
        return None
    offsets: list[int] = dispatch.offsets.tolist()
    total = offsets[-1]
    counts = [last - first for first, last in pairwise(offsets)]
    elements = weights.rows_per_neuron * sum(map(mul, counts, weights.all_widths)) if keep else 0
    kept = recycled(x, elements)
    padded = -(-widest // DEPTH) * DEPTH
    h = recycled(x, (total + SIDE * weights.num_experts) * padded)
    experts = array("q")
    for numbers in _experts(weights, offsets, up, down, h.data_ptr(), kept.data_ptr() if keep else 0):
        experts.extend(numbers)
    out = recycled(x, dispatch.tokens, weights.hidden)
    sums = recycled(x.new_empty(0, dtype=torch.float32), dispatch.tokens, weights.hidden)
    row_scores = None if scores is None else scores.index_select(0, dispatch.row_slot[:total])
    refused = run(
        code, weights.gated, experts.buffer_info()[0], len(experts) // 10, x.data_ptr(), x.stride(0), weights.hidden,
        index.data_ptr(), None if row_scores is None else row_scores.data_ptr(), dispatch.tokens, up.turned, down.turned,
        sums.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return None if refused else (out, kept)


def _layout(weights: ExpertWeights) -> tuple[_Matrices | None, _Matrices | None]:
    """How an expert's gate and up ``[I, H]`` lie, and its down ``[H, I]``; ``None`` where neither dimension is contiguous."""
    rows, inputs = weights.up.stride()[-2:]
    neurons, outputs = weights.down.stride()[-2:]  # of [I, H], as packed and transposed experts have it
    if weights.transposed:
        rows, inputs = inputs, rows
    elif not weights.packed:
        neurons, outputs = outputs, neurons
    return _matrices(rows * (2 if weights.gated and weights.interleaved else 1), inputs), _matrices(outputs, neurons)


def _matrices(outputs: int, inputs: int) -> _Matrices | None:
    return _Matrices(outputs, True) if inputs == 1 else _Matrices(inputs, False) if outputs == 1 else None


def _experts(
    weights: ExpertWeights, offsets: list[int], up: _Matrices, down: _Matrices, h: int, z: int
) -> Iterator[tuple[int, ...]]:
    """``struct Expert`` of ``tile_experts.hpp`` for all that have rows: addresses, strides and sizes.

    Asking a tensor for views takes longer than small products do, and they are asked for at every pass.
    """
    size, per_neuron = weights.up.itemsize, weights.rows_per_neuron
    starts, rows = weights.starts, weights.up.stride(-1 if weights.transposed else -2)
    first_up, first_down = weights.up.data_ptr(), weights.down.data_ptr()
    for expert, width in enumerate(weights.all_widths):
        count = offsets[expert + 1] - offsets[expert]
        if not count:
            continue
        if weights.packed:
            up_at, down_at = per_neuron * starts[expert] * rows, starts[expert] * weights.down.stride(0)
        else:
            up_at, down_at = expert * weights.up.stride(0), expert * weights.down.stride(0)
        gate = first_up + size * up_at if weights.gated else 0
        between = 0 if not weights.gated else rows if weights.interleaved else width * rows
        yield (
            gate, first_up + size * (up_at + between), first_down + size * down_at,
            up.stride, down.stride, offsets[expert], count, width, h, z,
        )  # fmt: skip
        h += size * (count + SIDE) * -(-width // DEPTH) * DEPTH
        z += size * count * per_neuron * width if z else 0
