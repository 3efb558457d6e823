"""Products of many small bf16 matrices in one call, ``tile_products.cpp``, on CPUs with tiles (AMX)."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from upcycle.kernels.cpu.native.compile import Function, function
from upcycle.kernels.layout.plain_memory import is_plain
from upcycle.kernels.layout.token_rows import TokenRows

LARGEST_TILED = 2**21  # elements of a matrix: of larger ones, a product of oneDNN's takes longer than asking for it
_ARGUMENTS = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, *[ctypes.c_int64] * 6, *[ctypes.c_int] * 3)


class _Side(NamedTuple):
    """What the kernel is told of one side of its products."""

    like: torch.Tensor
    """A matrix with their dtype and strides."""
    places: Sequence[tuple[int, int, int]]
    """Address, address of the index or 0, and number of rows of each."""


def tile_products() -> Function | None:
    """``upcycle_tile_products`` of ``tile_products.cpp``; ``None`` where there are no tiles, or where it cannot be compiled."""
    if not torch.cpu._is_amx_tile_supported():
        return None
    return function("tile_products", "products of 16-bit experts", _ARGUMENTS)


def tiled_linear(
    rows: TokenRows | Sequence[torch.Tensor], weights: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], add: bool
) -> bool:
    """Write ``rows [n, j] @ weight [j, i]`` into every ``out [n, i]``, or add it; whether that was possible.

    Args:
        rows: fp32 parts of one matrix, or rows of fp32 or bf16 tokens.
        weights: bf16, all of one shape and the same strides, of which one is 1.
        outs: fp32, parts of one matrix.
        add: add to what is in ``outs``.
    """
    first, (j, i) = weights[0].stride(), weights[0].shape
    if 1 not in first or not _is_small(weights[0]) or not _are_rows(outs[0], torch.float32):
        return False
    left = _side(rows)
    if left is None:
        return False
    turned = first[0] == 1
    right = _Side(weights[0], [(weight.data_ptr(), 0, 0) for weight in weights])
    return _run(False, left, right, outs, (i, j), first[1] if turned else first[0], outs[0].stride(0), turned, add)


def tiled_outer(
    lefts: TokenRows | Sequence[torch.Tensor],
    rights: TokenRows | Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
) -> bool:
    """Write ``left [n, i].T @ right [n, j]`` into every ``out [i, j]``; whether that was possible.

    Args:
        lefts: fp32 parts of one matrix, or rows of fp32 or bf16 tokens.
        rights: the same; only one of both sides is bf16.
        outs: bf16, all with the same strides, of which one is 1.
    """
    first = outs[0].stride()
    if 1 not in first or not _is_small(outs[0]):
        return False
    left, right = _side(lefts), _side(rights)
    if left is None or right is None or left.like.dtype == right.like.dtype == torch.bfloat16:
        return False
    turned = first[1] != 1
    stride = first[1] if turned else first[0]
    return _run(True, left, right, outs, tuple(outs[0].shape), right.like.stride(0), stride, turned, False)


def _is_small(matrix: torch.Tensor) -> bool:
    """Whether there is a kernel for a matrix of weights or of their gradients."""
    small = matrix.dtype == torch.bfloat16 and matrix.numel() <= LARGEST_TILED
    return small and is_plain(matrix) and tile_products() is not None


def _are_rows(matrix: torch.Tensor, *dtypes: torch.dtype) -> bool:
    return matrix.dtype in dtypes and matrix.stride(1) == 1 and is_plain(matrix)


def _side(rows: TokenRows | Sequence[torch.Tensor]) -> _Side | None:
    """What the kernel reads; ``None`` where it cannot."""
    if not isinstance(rows, TokenRows):
        if not _are_rows(rows[0], torch.float32):
            return None
        return _Side(rows[0], [(row.data_ptr(), 0, len(row)) for row in rows])
    index, places = rows.index, []
    if not _are_rows(rows.tokens, torch.float32, torch.bfloat16) or index.dtype != torch.int32 or not is_plain(index):
        return None
    base, at = rows.tokens.data_ptr(), index.data_ptr()
    for count in rows.counts:
        places.append((base, at, count))
        at += index.itemsize * count
    return _Side(rows.tokens, places)


def _run(
    outer: bool,
    rows: _Side,
    others: _Side,
    outs: Sequence[torch.Tensor],
    shape: tuple[int, ...],
    other_stride: int,
    out_stride: int,
    turned: bool,
    add: bool,
) -> bool:
    run = tile_products()
    assert run is not None
    items = array("q")
    for (row, index, count), (other, other_index, _), out in zip(rows.places, others.places, outs, strict=True):
        items.extend((row, index, count, other, other_index, out.data_ptr()))
    halves = int(rows.like.dtype == torch.bfloat16) + 2 * int(others.like.dtype == torch.bfloat16)
    refused = run(
        outer, halves, items.buffer_info()[0], len(outs), *shape, rows.like.stride(0), other_stride, out_stride,
        turned, add, torch.get_num_threads(),
    )  # fmt: skip
    return not refused
