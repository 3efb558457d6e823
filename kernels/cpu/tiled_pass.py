"""A whole pass of tokens through small bf16 experts in one call, ``tile_pass.cpp``, on CPUs with tiles (AMX)."""

from __future__ import annotations

import ctypes
from array import array

import torch

from upcycle.kernels.cpu.fused_activations import FUSED_CODES
from upcycle.kernels.cpu.native.compile import Function, function
from upcycle.kernels.cpu.native.tile_products import LARGEST_TILED
from upcycle.kernels.cpu.recycled_memory import recycled
from upcycle.kernels.layout.dispatch import Dispatch
from upcycle.kernels.layout.expert_weights import ExpertWeights
from upcycle.kernels.layout.plain_memory import is_plain

_SIDE, _DEPTH = 16, 32  # rows of a tile, and numbers that it sums over
_ARGUMENTS = (
    *[ctypes.c_int] * 2,
    *[ctypes.c_void_p, ctypes.c_int64] * 2,
    ctypes.c_int64,
    *[ctypes.c_void_p] * 2,
    ctypes.c_int64,
    *[ctypes.c_int64, ctypes.c_int] * 2,
    ctypes.c_void_p,
    ctypes.c_int64,
    *[ctypes.c_void_p] * 2,
    ctypes.c_int,
)


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
    widest = weights.rows_per_neuron * max(weights.all_widths, default=0)
    if code is None or widest * weights.hidden > LARGEST_TILED or index.dtype != torch.int32:
        return None
    if x.stride(-1) != 1 or not is_plain(x, weights.up, weights.down, scores, index) or (run := tile_pass()) is None:
        return None
    offsets: list[int] = dispatch.offsets.tolist()
    busy = [expert for expert in range(weights.num_experts) if offsets[expert + 1] > offsets[expert]]
    out = recycled(x, dispatch.tokens, weights.hidden)
    if not busy:
        return out.zero_(), x.new_empty(0)
    gates = weights.matrices("gate", busy) if weights.gated else []
    ups, downs = weights.matrices("up", busy), weights.matrices("down", busy)
    strides = [_stride(matrices[0]) for matrices in (ups, downs)]
    if None in strides:
        return None
    (up_stride, up_turned), (down_stride, down_turned) = (stride for stride in strides if stride)
    rows = [offsets[expert + 1] - offsets[expert] for expert in busy]
    widths = [weights.width(expert) for expert in busy]
    columns = [weights.rows_per_neuron * width for width in widths]
    kept = recycled(x, sum(map(int.__mul__, rows, columns)) if keep else 0)
    experts, z = array("q"), kept.data_ptr()
    for number, expert in enumerate(busy):
        gate = gates[number].data_ptr() if gates else 0
        at = (gate, ups[number].data_ptr(), downs[number].data_ptr())
        experts.extend((*at, offsets[expert], rows[number], widths[number], z if keep else 0))
        z += x.itemsize * rows[number] * columns[number]
    total, h_columns = offsets[-1], -(-max(widths) // _DEPTH) * _DEPTH
    row_scores = None if scores is None else scores.float().index_select(0, dispatch.row_slot[:total])
    h = recycled(x, total + _SIDE, h_columns)
    sums = torch.empty(dispatch.tokens, weights.hidden)
    refused = run(
        code, weights.gated, experts.buffer_info()[0], len(busy), x.data_ptr(), x.stride(0), weights.hidden, index.data_ptr(),
        None if row_scores is None else row_scores.data_ptr(), dispatch.tokens, up_stride, up_turned, down_stride, down_turned,
        h.data_ptr(), h_columns, sums.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return None if refused else (out, kept)


def _stride(matrix: torch.Tensor) -> tuple[int, bool] | None:
    """The stride of ``[outputs, inputs]`` that is not 1, and whether it is that of outputs; ``None`` where none is 1."""
    outputs, inputs = matrix.stride()
    return (outputs, True) if inputs == 1 else (inputs, False) if outputs == 1 else None

