"""Ternary matrices as codes of the dictionary, and back: without loss, and every row alone.

A row of a ternary matrix holds at most one negative number, zero, and at most one positive number, as QMoE rounds experts (Frantar
& Alistarh 2023, arXiv 2310.16795). Its trits are divided into words of the dictionary from the left; the last word may reach over
its end. R rows, C columns, N codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from upcycle.errors import CheckpointError
from upcycle.kernels.cpu.native.ternary import decode_natively
from upcycle.methods.compressing.qmoe_codec.dictionary import LONGEST_WORD, dictionary

_MOST_CODES = (1 << 16) - 1  # of a row
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_STEP = 1 << 16  # codes that are decoded at once without the compiled kernel


@dataclass(frozen=True)
class Coded:
    """Holds a ternary matrix ``[R, C]``.

    Attributes:
        codes: uint16 ``[N]``, those of all rows one after another.
        counts: uint16 ``[R]``, the number of codes of each row.
        scales: ``[R, 2]``, of the matrix's dtype: what a row has for -1 and for 1 (0: it has none).
        columns: C.
    """

    codes: torch.Tensor
    counts: torch.Tensor
    scales: torch.Tensor
    columns: int

    @property
    def bits_per_weight(self) -> float:
        """All that is stored, in bits, over the number of weights."""
        parts = (self.codes, self.counts, self.scales)
        return 8.0 * sum(part.numel() * part.element_size() for part in parts) / (len(self.counts) * self.columns)


def ternary_parts(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the trits int8 ``[R, C]`` and the scales ``[R, 2]`` of a matrix; None: it is not ternary, bit for bit.

    A zero with a sign, and numbers that are not finite, are no trits.
    """
    low, high = matrix.amin(1, keepdim=True).clamp(max=0), matrix.amax(1, keepdim=True).clamp(min=0)
    trits = (matrix > 0).to(torch.int8) - (matrix < 0).to(torch.int8)
    scales = torch.cat([low, high], 1)
    scales = torch.where(scales == 0, torch.zeros_like(scales), scales)  # clamps may leave -0
    return (trits, scales) if torch.equal(_bits(_valued(trits, scales)), _bits(matrix)) else None


def _valued(trits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    none = torch.zeros((), dtype=scales.dtype)
    return torch.where(trits > 0, scales[:, 1:], torch.where(trits < 0, scales[:, :1], none))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])


def encode_ternary(matrix: torch.Tensor) -> Coded | None:
    """Return a floating matrix ``[R, C]`` in codes; None: a row of it is not ternary, or has more codes than can be counted."""
    found = ternary_parts(matrix) if matrix.numel() else None
    if found is None:
        return None
    trits, scales = found
    book = dictionary()
    rows, columns = trits.shape
    columnwise = np.ascontiguousarray(trits.numpy().T) + np.int8(1)
    node = np.zeros(rows, np.int32)
    written: list[tuple[np.ndarray, np.ndarray]] = []  # rows and the words that end in a column
    for trit in columnwise:
        after = book.steps[node, trit]
        ended = np.flatnonzero(after < 0)
        written.append((ended, -1 - after[ended]))
        node = np.maximum(after, 0)
    open_rows = np.flatnonzero(node)
    written.append((open_rows, book.ends[node[open_rows]]))
    row = np.concatenate([rows_of for rows_of, _ in written])
    word = np.concatenate([words for _, words in written])
    counts = np.bincount(row, minlength=rows)
    if counts.max() > _MOST_CODES:
        return None
    codes = word[np.argsort(row, kind="stable")].astype(np.uint16)  # words of a row stay in order
    return Coded(torch.from_numpy(codes), torch.from_numpy(counts.astype(np.uint16)), scales.contiguous(), columns)


def decode_ternary(
    coded: Coded, first: int = 0, count: int | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``count`` rows of a matrix from ``first`` on, ``[count, C]``; None: all of them.

    Args:
        coded: the matrix.
        first: the first row.
        count: see above.
        out: what to write them to; None: a new tensor.

    Raises:
        CheckpointError: the codes are damaged: they do not fill the rows.
    """
    counts = coded.counts.to(torch.int64)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    last = len(counts) if count is None else first + count
    if int(ends[-1]) != coded.codes.numel():
        raise CheckpointError(f"damaged codes: there are {coded.codes.numel()}, and the rows have {int(ends[-1])}")
    if coded.columns > LONGEST_WORD * int(counts.max()):  # before room is made for so many
        raise CheckpointError(f"damaged codes: no row has enough for {coded.columns} columns")
    book = dictionary()
    part, scales = ends[first : last + 1].contiguous(), coded.scales[first:last].contiguous()
    if out is None:
        out = torch.empty(last - first, coded.columns, dtype=scales.dtype)
    assert out.shape == (last - first, coded.columns)
    assert out.dtype == scales.dtype
    assert out.is_contiguous()
    planes, lengths = torch.from_numpy(book.planes.view(np.int64)), torch.from_numpy(book.lengths)
    fault = decode_natively(coded.codes, part, planes, lengths, scales, out)
    if fault is None:
        fault = _decode(coded.codes, part, scales, out)
    if fault >= 0:
        raise CheckpointError(f"damaged codes: those of row {first + fault} do not fill its {coded.columns} columns")
    return out


def _decode(codes: torch.Tensor, ends: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> int:
    """Decode rows by NumPy; returns the first damaged one, or -1."""
    book, columns = dictionary(), out.shape[1]
    rows = max(1, _STEP * len(out) // max(1, int(ends[-1] - ends[0])))
    for first in range(0, len(out), rows):
        bounds = ends[first : first + rows + 1].numpy()
        words = codes[int(bounds[0]) : int(bounds[-1])].numpy().astype(np.int64)
        row: npt.NDArray[np.int64] = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
        lengths = np.where(words < len(book.lengths), book.lengths[np.minimum(words, len(book.lengths) - 1)], 0)
        # Where each word begins in its row; the last is cut at the row's end.
        begins = np.cumsum(lengths, dtype=np.int64) - lengths
        sums = np.concatenate([begins, [lengths.sum(dtype=np.int64)]])
        begins = begins - sums[bounds[:-1] - bounds[0]][row]
        taken = np.minimum(lengths, columns - begins)
        filled = np.bincount(row, np.maximum(taken, 0), len(bounds) - 1)
        wrong = (filled != columns) | (np.bincount(row, taken <= 0, len(bounds) - 1) > 0)
        if wrong.any():
            return first + int(np.flatnonzero(wrong)[0])
        trits = book.words[words][np.arange(LONGEST_WORD) < taken[:, None]].reshape(-1, columns)
        out[first : first + rows] = _valued(torch.from_numpy(trits), scales[first : first + rows])
    return -1
