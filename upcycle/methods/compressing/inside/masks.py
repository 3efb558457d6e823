"""Which weights of a matrix become zeros: by size and input (Wanda), or one column after another, the others making up (SparseGPT)."""

from __future__ import annotations

import torch

GROUP = 4  # of the pattern 2:4: two of every four neighbours in a row stay
_BLOCK = 128  # columns among which SparseGPT chooses, without a pattern
_DAMPING = 0.01  # of the mean of the Hessian's diagonal


def wanda(weight: torch.Tensor, hessian: torch.Tensor, keep: float, grouped: bool) -> torch.Tensor:
    """Return the matrix with zeros where ``|W_ij| ||X_j||`` is smallest in its row (Sun et al. 2023, arXiv 2306.11695, eq. 1).

    Args:
        weight: ``[rows, columns]``.
        hessian: the products of inputs summed over tokens, ``[columns, columns]``; only its diagonal is read.
        keep: the share of every row that stays.
        grouped: whether two of every four neighbours stay instead.
    """
    wide = weight.double()
    scores = wide.abs() * _damped(hessian).diagonal().sqrt()
    if grouped:
        return torch.where(_best_two(scores), wide, 0.0)
    stays = torch.zeros_like(wide, dtype=torch.bool)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, : round(keep * wide.shape[1])]
    return torch.where(stays.scatter(1, order, value=True), wide, 0.0)


def sparse_gpt(weight: torch.Tensor, hessian: torch.Tensor, keep: float, grouped: bool) -> torch.Tensor:
    """Return the matrix with zeros, and the weights behind each changed to make up for it (Frantar and Alistarh, arXiv 2301.00774).

    With the upper Cholesky factor U of the inverse of ``H``, column i is visited in order; where its weight goes, those behind
    change by ``-w_i / U_ii U_i:`` (algorithm 1). The weights of the smallest ``(w_i / U_ii)^2`` go, in every block of 128 columns of
    the whole matrix, or in every four neighbours of a row. Arguments are those of :func:`wanda`.
    """
    made = weight.double().clone()
    rows, columns = made.shape
    inverse = torch.linalg.inv(_damped(hessian))
    factor = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    step = GROUP if grouped else _BLOCK
    for first in range(0, columns, step):
        last = min(first + step, columns)
        scores = (made[:, first:last] / factor.diagonal()[first:last]).square()
        if grouped:
            stays = _best_two(scores)
        else:
            gone = round((1 - keep) * scores.numel())
            stays = torch.ones(scores.numel(), dtype=torch.bool)
            stays[torch.sort(scores.flatten(), stable=True).indices[:gone]] = False
            stays = stays.view(rows, -1)
        for column in range(first, last):
            error = torch.where(stays[:, column - first], 0.0, made[:, column]) / factor[column, column]
            made[:, column:] -= error[:, None] * factor[column, column:]
        made[:, first:last] = torch.where(stays, made[:, first:last], 0.0)
    return made


def _best_two(scores: torch.Tensor) -> torch.Tensor:
    groups = scores.unflatten(1, (-1, GROUP))
    two = torch.sort(groups, dim=2, descending=True, stable=True).indices[..., : GROUP // 2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter(2, two, value=True).flatten(1)


def _damped(hessian: torch.Tensor) -> torch.Tensor:
    wide = hessian.double()
    mean = wide.diagonal().mean()
    return wide + (_DAMPING * mean if mean > 0 else 1.0) * torch.eye(len(wide), dtype=torch.float64)
