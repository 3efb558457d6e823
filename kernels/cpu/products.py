"""Matrix products of one pass over experts on a CPU: summed in fp32 whatever the storage, with weights cast piece by piece.

A *piece* is a range of a weight matrix's rows that stays in the cache between its cast and its use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from upcycle.kernels.cpu.native.tile_products import tiled_linear, tiled_outer
from upcycle.kernels.layout.token_rows import TokenRows, parts_of

PIECE = 2**17  # elements of a cast piece: half a megabyte in fp32
LARGE = 2**20  # elements of a matrix that does not stay in the cache between two rows
FEW = range(2, 5)  # rows that are multiplied faster as columns, if the matrix is large and has more outputs than inputs


@lru_cache
def fast_natively(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions that multiply matrices of a 16-bit dtype."""
    if dtype == torch.bfloat16:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return dtype == torch.float16 and bool(torch.cpu._is_amx_fp16_supported())


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products with ``dtype`` are summed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def padded_rows(count: int) -> int:
    """The next number of rows of few: multiples of 8, and of a sixteenth of the next power of two.

    oneDNN, which multiplies 16-bit matrices, makes code for every new shape and keeps 1,024 of them. Experts see another number
    of tokens at each pass: most products would wait for their code, for ten times as long as they take.
    """
    step = max(8, 1 << max(0, count.bit_length() - 4)) if count > 1 else 1
    return -(-count // step) * step


class Products:
    """Products of matrices in the accumulator's dtype with weights that may be of another, many at a time."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Prepare products with weights of a dtype; 16-bit ones are multiplied as they are where the CPU can."""
        self.dtype, self.sum = dtype, accumulator(dtype)
        self._same = dtype == self.sum
        self._native = not self._same and fast_natively(dtype)
        self._piece = torch.empty(0, dtype=self.sum)

    def linear(
        self,
        rows: TokenRows | Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
        add: bool = False,
    ) -> None:
        """Write ``rows [n, j] @ weight [j, i]`` into every ``out [n, i]``, or add it.

        Rows and outs are parts of one matrix each; weights are of one shape and have the same strides, whatever these are.
        """
        if self._native and len(outs) and tiled_linear(rows, weights, outs, add):
            return
        rows = parts_of(rows)
        if self._same and not add:
            for left, right, out in zip(rows, weights, outs, strict=True):
                if len(left) in FEW and right.numel() >= LARGE and right.shape[0] <= right.shape[1]:
                    out.copy_(torch.mm(right.T, left.T).T)
                else:
                    torch.mm(left, right, out=out)
            return
        for left, right, out in zip(rows, weights, outs, strict=True):
            if self._same:
                out.addmm_(left, right)
            elif self._native or len(left) == 1:
                # A single row reads every weight once: a cast would take longer than the product.
                made = (self._padded(left) @ right)[: len(left)]
                _ = out.add_(made) if add else out.copy_(made)
            else:
                self._linear_by_pieces(left, right, out, add)

    def outer(
        self,
        lefts: TokenRows | Sequence[torch.Tensor],
        rights: TokenRows | Sequence[torch.Tensor],
        outs: Sequence[torch.Tensor],
    ) -> None:
        """Write ``left [n, i].T @ right [n, j]`` into every ``out [i, j]``, which has the weights' dtype.

        Lefts and rights are parts of one matrix each; outs have the same strides, whatever these are.
        """
        if self._native and len(outs) and tiled_outer(lefts, rights, outs):
            return
        for left, right, out in zip(parts_of(lefts), parts_of(rights), outs, strict=True):
            if self._same:
                torch.mm(left.T, right, out=out)
            elif self._native:
                out.copy_(self._padded(left).T @ self._padded(right))
            elif out.stride(0) < out.stride(1):  # written in the order in which it lies in memory
                self._outer_by_pieces(right.T, left, out.T)
            else:
                self._outer_by_pieces(left.T, right, out)

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        """``[n, j]`` cast to the weights' dtype as ``[padded_rows(n), j]``, whose last rows are zeros."""
        cast = rows.new_empty(padded_rows(len(rows)), rows.shape[1], dtype=self.dtype)
        cast[: len(rows)].copy_(rows)
        cast[len(rows) :].zero_()
        return cast

    def _linear_by_pieces(self, rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, add: bool) -> None:
        whole = weight.numel() <= PIECE
        for part in _ranges(weight.shape[1], weight.shape[0]):
            piece, target = (weight, out) if whole else (weight[:, part], out[:, part])
            if piece.stride(0) < piece.stride(1):
                cast = self._buffer(piece.shape[1], piece.shape[0]).copy_(piece.T).T
            else:
                cast = self._buffer(*piece.shape).copy_(piece)
            if add:
                target.addmm_(rows, cast)
            else:
                torch.mm(rows, cast, out=target)

    def _outer_by_pieces(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        for part in _ranges(*out.shape):
            target = out[part]
            target.copy_(torch.mm(left[part], right, out=self._buffer(*target.shape)))

    def _buffer(self, rows: int, columns: int) -> torch.Tensor:
        if len(self._piece) < rows * columns:
            self._piece = torch.empty(rows * columns, dtype=self.sum)
        return self._piece[: rows * columns].view(rows, columns)


def _ranges(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, PIECE // columns)
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))
