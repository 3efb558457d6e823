"""Rounds matrices to three numbers per row, {smallest, 0, largest}, as QMoE does (Frantar & Alistarh 2023, arXiv 2310.16795).

R rows (outputs), C columns (inputs).
"""

from __future__ import annotations

import torch

_BLOCK = 128  # columns whose errors are carried over to the rest at once


def nearest_ternary(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix ``[..., R, C]`` with every number rounded to the nearest of its row's smallest, 0 and largest.

    A row without negative numbers has two numbers alone, and so has one without positive ones. What lies in the middle becomes 0.
    """
    return _rounded(matrix, *_grid(matrix))


def _grid(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = matrix.amin(-1, keepdim=True).clamp(max=0), matrix.amax(-1, keepdim=True).clamp(min=0)
    return low, high


def _rounded(matrix: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    none = torch.zeros((), dtype=matrix.dtype)
    return torch.where(matrix > high / 2, high, torch.where(matrix < low / 2, low, none))


def ternary_of_least_error(matrix: torch.Tensor, gram: torch.Tensor, damping: float = 0.1) -> torch.Tensor:
    """Return the rounded matrix ``Q`` of little ``||(M - Q) X||^2`` for inputs X with ``X X^T = gram`` (GPTQ, arXiv 2210.17323).

    Columns are rounded from the first to the last, and the error of each is made up for by those that are still to be rounded. The
    numbers to choose from are those of the matrix's rows, not of what the errors made of them.

    Args:
        matrix: fp32 ``[R, C]``.
        gram: fp64 ``[C, C]``; where it says nothing (no inputs, or not finite), every number is rounded to the nearest.
        damping: added to the diagonal, times its mean; QMoE takes 0.1, since experts see few tokens.
    """
    low, high = _grid(matrix)
    scale = gram.diagonal().mean()
    if not bool(gram.isfinite().all()) or not scale > 0:
        return _rounded(matrix, low, high)
    hessian = gram.double() + damping * scale * torch.eye(len(gram), dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, made = matrix.double().clone(), torch.empty_like(matrix, dtype=torch.float64)
    low64, high64 = low.double()[:, 0], high.double()[:, 0]
    for first in range(0, matrix.shape[1], _BLOCK):
        last = min(first + _BLOCK, matrix.shape[1])
        errors = torch.empty(len(matrix), last - first, dtype=torch.float64)
        for column in range(first, last):
            made[:, column] = _rounded(left[:, column], low64, high64)
            errors[:, column - first] = (left[:, column] - made[:, column]) / upper[column, column]
            left[:, column + 1 : last] -= errors[:, column - first, None] * upper[column, None, column + 1 : last]
        left[:, last:] -= errors @ upper[first:last, last:]
    return made.to(matrix.dtype)
