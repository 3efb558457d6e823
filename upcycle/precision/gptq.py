"""Rounds a matrix so that its outputs change least on the inputs that it sees: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

R rows, C columns (inputs). Column after column is rounded, and the columns that follow make up for the error as well as they can.
With ``H = sum_t x_t x_t^T`` and ``U`` the upper Cholesky factor of its inverse, ``U^T U = H^-1``, column i leaves the error
``e = (w_i - q_i) / U_ii``, and ``e U_ij`` is taken off every column j behind it.

Where few tokens were seen, H says little: then the damping of its diagonal grows, which is nearest rounding in the limit.
"""

from __future__ import annotations

import torch

from upcycle.precision.grid import NumberGrid, Rounded, meant, scales_of, to_nearest

DAMPING = 0.01  # of the mean of the diagonal, where there are many tokens
LEAST_TOKENS = 32  # below that, nothing is known
_EXACT = 1024  # columns up to which the factorisation is in fp64
_BLOCK = 128


def damping(tokens: int, columns: int) -> float:
    """Return what is added to the diagonal, relative to its mean: more where there are fewer tokens than columns."""
    return DAMPING * (1 + columns / max(tokens, 1))


def gptq(weight: torch.Tensor, hessian: torch.Tensor, grid: NumberGrid, damped: float) -> Rounded:
    """Round ``weight`` ``[R, C]`` for inputs with the second moments ``hessian`` ``[C, C]``.

    Deviations: columns of large inputs are rounded first, as more others then make up for their errors; scales are fitted before
    anything is rounded, with the columns' errors weighed by their inputs, so that no order has to be stored.

    Returns:
        The result; that of nearest rounding, where the Hessian cannot be factorised.
    """
    columns = weight.shape[1]
    dtype = torch.float64 if columns <= _EXACT else torch.float32
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _factor(hessian.to(dtype)[order][:, order], damped)
    if factor is None or not bool(torch.isfinite(factor).all()):
        return to_nearest(weight, grid)
    scales = scales_of(weight, grid, hessian.diagonal().float())
    least, last = grid.range
    left = weight.to(dtype)[:, order].clone()
    places = order // (grid.group or columns)
    values = torch.empty(weight.shape, dtype=torch.int8)
    product = torch.float32 if grid.wide else scales.dtype
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty(len(left), end - start, dtype=dtype)
        for column in range(start, end):
            scale = scales[:, places[column]]
            own = left[:, column]
            rounded = (own / scale.to(dtype)).round().clamp(least, last)
            values[:, order[column]] = rounded.to(torch.int8)
            means = (rounded.to(product) * scale.to(product)).to(dtype)
            error = (own - means) / factor[column, column]
            left[:, column + 1 : end] -= error[:, None] * factor[column, column + 1 : end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    return meant(values, scales, grid)


def _factor(hessian: torch.Tensor, damped: float) -> torch.Tensor | None:
    """Return the upper Cholesky factor of the inverse of the damped Hessian; None: it cannot be inverted."""
    regular = hessian.clone()
    diagonal = regular.diagonal()
    mean = diagonal.mean()
    if not bool(mean > 0):
        return None
    diagonal.add_(damped * mean)
    lower, fault = torch.linalg.cholesky_ex(regular)
    if bool(fault):
        return None
    upper, fault = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if bool(fault) else upper


def output_error(weight: torch.Tensor, means: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return how much the outputs of a matrix change, squared and summed over the tokens of a Hessian."""
    change = (weight.float() - means).to(hessian.dtype)
    return float((change @ hessian * change).sum())


def best_rounding(
    weight: torch.Tensor, seen: torch.Tensor, held_out: torch.Tensor | None, tokens: int, grid: NumberGrid
) -> tuple[Rounded, bool]:
    """Round a matrix by GPTQ, unless nearest rounding changes its outputs less on tokens that GPTQ did not see.

    Args:
        weight: ``[R, C]``.
        seen: the second moments of its inputs, on the tokens that GPTQ sees.
        held_out: those of others; None: there are none, and the same tokens judge.
        tokens: how many GPTQ sees.
        grid: the numbers to round to.

    Returns:
        The rounded matrix, and whether it is GPTQ's.
    """
    plain = to_nearest(weight, grid)
    if tokens < LEAST_TOKENS:
        return plain, False
    made = gptq(weight, seen, grid, damping(tokens, weight.shape[1]))
    judge = seen if held_out is None else held_out
    if output_error(weight, made.means, judge) < output_error(weight, plain.means, judge):
        return made, True
    return plain, False
