"""Matrix products of one pass over experts on a CPU: summed in fp32 whatever the storage, with weights cast piece by piece.

A *piece* is a range of a weight matrix's rows that stays in the cache between its cast and its use.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

PIECE = 2**17  # elements of a cast piece: half a megabyte in fp32


@lru_cache
def fast_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions that multiply matrices of a 16-bit dtype."""
    if dtype == torch.bfloat16:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return dtype == torch.float16 and bool(torch.cpu._is_amx_fp16_supported())


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What is summed in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Products:
    """Products of matrices in the accumulator's dtype with weights that may be of another."""

    def __init__(self, dtype: torch.dtype, native: bool | None = None) -> None:
        """
        Args:
            dtype: of the weights.
            native: whether factors are rounded to a 16-bit ``dtype`` for the CPU's own instructions; ``None``: where there are.
        """
        self.dtype, self.sum = dtype, accumulator(dtype)
        self._same = dtype == self.sum
        self._native = not self._same and (fast_natively(dtype) if native is None else native)
        self._piece = torch.empty(0, dtype=self.sum)

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        """``rows [n, j] @ weight [i, j].T`` into ``out [n, i]``, or added to it; ``weight`` and ``out`` may be strided."""
        if self._same:
            _product(rows, weight.T, out, add)
        elif self._native or len(rows) == 1:  # one row reads every weight once: a cast would cost more than the product
            made = rows.to(self.dtype) @ weight.T
            _ = out.add_(made) if add else out.copy_(made)
        else:
            for part, piece in self._pieces(weight):
                _product(rows, piece.T, out[:, part], add)

    def outer(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        """``left [n, i].T @ right [n, j]`` into ``out [i, j]``, which has the weights' dtype and may be strided."""
        if self._same:
            torch.mm(left.T, right, out=out)
        elif out.stride(0) < out.stride(1):  # columns are nearer to each other than rows: in this order, they are written
            self.outer(right, left, out.T)
        elif self._native:
            torch.mm(left.to(self.dtype).T, right.to(self.dtype), out=out)
        else:
            for part in _ranges(*out.shape):
                target = out[part]
                target.copy_(torch.mm(left[:, part].T, right, out=self._buffer(*target.shape)))

    def _pieces(self, weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        for part in _ranges(*weight.shape):
            piece = weight[part]
            if piece.stride(-1) == 1:
                yield part, self._buffer(*piece.shape).copy_(piece)
            else:
                yield part, self._buffer(*piece.T.shape).copy_(piece.T).T

    def _buffer(self, rows: int, columns: int) -> torch.Tensor:
        if len(self._piece) < rows * columns:
            self._piece = torch.empty(rows * columns, dtype=self.sum)
        return self._piece[: rows * columns].view(rows, columns)


def _product(rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    if add:
        out.addmm_(rows, matrix)
    else:
        torch.mm(rows, matrix, out=out)


def _ranges(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, PIECE // columns)
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))
