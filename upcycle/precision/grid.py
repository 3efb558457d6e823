"""Rounds matrices to few bits: integers times a scale per row, or per group of columns of a row.

R rows, C columns, G groups of a row, b bits. Integers are between ``-2 ** (b - 1)`` and ``2 ** (b - 1) - 1``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

_FP8 = torch.float8_e4m3fn
_SEARCHED = 4  # bits up to which the scale is searched for, and may be negative
_STEPS = 20
_SMALLEST = 0.35  # of the scales that are tried, relative to the one that clips nothing
_ROWS_AT_ONCE = 1 << 22  # numbers whose scales are searched for at once


@dataclass(frozen=True)
class NumberGrid:
    """Describes the numbers that a matrix can be rounded to.

    Attributes:
        bits: of an integer; 0: FP8 (E4M3).
        group: columns of a row that share a scale; 0: all.
        dtype: the name of the scales' dtype.
        wide: values and scales are multiplied in fp32, and not in the scales' dtype.
    """

    bits: int
    group: int
    dtype: str
    wide: bool = False

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    def groups(self, columns: int) -> int:
        """Return how many scales a row has."""
        return columns // self.group if self.group else 1

    def stored_bits(self, columns: int) -> float:
        """Return the bits per weight on disk, scales included."""
        scale = torch.finfo(getattr(torch, self.dtype)).bits
        return (self.bits or 8) + scale * self.groups(columns) / columns


class Rounded(NamedTuple):
    """A rounded matrix: ``values`` int8 or FP8 ``[R, C]``, ``scales`` ``[R, G]`` as they are stored, and the fp32 it ``means``."""

    values: torch.Tensor
    scales: torch.Tensor
    means: torch.Tensor


def to_nearest(weight: torch.Tensor, grid: NumberGrid) -> Rounded:
    """Round every number of ``weight`` ``[R, C]`` to the nearest of the grid, whose scales are fitted to it."""
    return _rounded(weight, scales_of(weight, grid), grid)


def scales_of(weight: torch.Tensor, grid: NumberGrid, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Return scales ``[R, G]`` for a matrix ``[R, C]``; ``importance`` ``[C]`` weighs the squared errors of its columns."""
    parts = weight.float().unflatten(1, (grid.groups(weight.shape[1]), -1))
    weighed = None if importance is None else importance.view(1, *parts.shape[1:]).expand(parts.shape).flatten(0, 1)
    return _fitted(parts.flatten(0, 1), grid, weighed).view(parts.shape[:2])


def _rounded(weight: torch.Tensor, scales: torch.Tensor, grid: NumberGrid) -> Rounded:
    """Round ``weight`` ``[R, C]`` with given scales ``[R, G]``, which are stored in ``grid.dtype`` already."""
    parts = weight.float().unflatten(1, (scales.shape[1], -1))
    if grid.bits:
        values = (parts / scales[..., None].float()).round().clamp(*grid.range).to(torch.int8)
    else:
        most = torch.finfo(_FP8).max
        values = (parts / scales[..., None].float()).clamp(-most, most).to(_FP8)
    return meant(values.flatten(1), scales, grid)


def meant(values: torch.Tensor, scales: torch.Tensor, grid: NumberGrid) -> Rounded:
    """Return values ``[R, C]`` and scales ``[R, G]`` with what they mean: their products, in the dtype that loaders multiply in."""
    dtype = torch.float32 if grid.wide or not grid.bits else scales.dtype
    parts = values.to(dtype).unflatten(1, (scales.shape[1], -1)) * scales[..., None].to(dtype)
    return Rounded(values, scales, parts.flatten(1).float())


def _fitted(parts: torch.Tensor, grid: NumberGrid, importance: torch.Tensor | None) -> torch.Tensor:
    """Return a scale for each of ``[N, g]`` groups of numbers, in ``grid.dtype``.

    With many bits it is the smallest that clips nothing. With up to four, it is the one of a list that leaves the least squared
    error, and it may be negative: there is one more integer below zero than above, which the longer tail gets.
    """
    dtype = getattr(torch, grid.dtype)
    most = parts.abs().amax(1)
    most = torch.where(most > 0, most, torch.ones_like(most))
    if not grid.bits:
        return (most / torch.finfo(_FP8).max).to(dtype)
    least, last = grid.range
    if grid.bits > _SEARCHED:
        return (most / last).to(dtype)
    best = torch.empty_like(most)
    step = max(1, _ROWS_AT_ONCE // parts.shape[1])
    for first in range(0, len(parts), step):
        rows, high = parts[first : first + step], most[first : first + step]
        weights = None if importance is None else importance[first : first + step]
        error = torch.full_like(high, float("inf"))
        chosen = high.clone()
        for place in range(_STEPS):
            part = 1 - (1 - _SMALLEST) * place / (_STEPS - 1)
            for sign in (1, -1):
                scale = (sign * part * high / (last + 0.5)).to(dtype).float()
                scale = torch.where(scale == 0, high, scale)[:, None]
                missed = (rows / scale).round().clamp_(least, last).mul_(scale).sub_(rows).square_()
                found = (missed if weights is None else missed.mul_(weights)).sum(1)
                better = found < error
                error = torch.where(better, found, error)
                chosen = torch.where(better, scale[:, 0], chosen)
        best[first : first + step] = chosen
    return best.to(dtype)
