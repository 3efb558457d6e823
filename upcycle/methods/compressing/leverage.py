"""Which neurons of an FFN the others cannot replace, and how those that stay make up for those that go (MoDeGPT's type I).

F neurons, K of them kept, d the hidden size.
"""

from __future__ import annotations

import torch

ROUNDS = 16


def ridge_leverage(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the ridge leverage ``[C (C + r I)^-1]_jj`` of every neuron, fp64 ``[F]`` (Lin et al. 2024, arXiv 2408.09632, type I).

    Args:
        gram: ``C``, the products of activations summed over tokens, ``[F, F]``.
        ridge: ``r`` relative to the mean of C's diagonal.
    """
    wide = gram.double()
    scores: torch.Tensor = torch.linalg.solve(regularized(wide, ridge), wide).diagonal()
    return scores


def least_missed(gram: torch.Tensor, down: torch.Tensor, count: int, ridge: float) -> torch.Tensor:
    """Return the neurons that are left when those go, in rounds, without which the refitted others miss the least of the output.

    With the activations' products ``C`` of those that are left, the squared error rises by ``||down_j||^2 / [(C + r I)^-1]_jj`` where
    neuron j goes and the down projections of the others are fitted anew (Optimal Brain Surgeon; in terms of leverage,
    ``r ||down_j||^2 / (1 - leverage_j)``). After each of at most ``ROUNDS`` rounds, what went is spread over the down projections
    of those that are left, and all are judged again.

    Args:
        gram: ``[F, F]``.
        down: ``[d, F]``.
        count: how many are left.
        ridge: ``r`` relative to the mean of C's diagonal.

    Returns:
        int64 ``[count]``, ascending.
    """
    wide, weights = regularized(gram.double(), ridge), down.double()
    left = torch.arange(len(wide))
    each = -(-(len(wide) - count) // ROUNDS)
    while len(left) > count:
        inverse = torch.linalg.inv(wide[left][:, left])
        missed = weights.square().sum(0) / inverse.diagonal()
        going = torch.sort(missed, stable=True).indices[: min(each, len(left) - count)]
        stay = torch.ones(len(left), dtype=torch.bool)
        stay[going] = False
        # The fit of what goes by what stays: -[C^-1]_(gg)^-1 [C^-1]_(gs).
        spread = torch.linalg.solve(inverse[going][:, going], inverse[going][:, stay])
        weights = weights[:, stay] - weights[:, going] @ spread
        left = left[stay]
    return left


def nystrom_down(gram: torch.Tensor, kept: torch.Tensor, down: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return the down projection of the kept neurons, fp64 ``[d, K]``, that is nearest to the whole one's output.

    With the selection S of neurons and ``W`` the transpose of ``down``, it is that of ``(S^T C S + r I)^-1 S^T C W``: Nystrom's
    approximation, and the least-squares fit of ``h W`` by the kept activations.

    Args:
        gram: ``C``, ``[F, F]``.
        kept: int64 ``[K]``.
        down: ``[d, F]``.
        ridge: ``r`` relative to the mean of the diagonal of ``S^T C S``.
    """
    wide = gram.double()
    rows = wide[kept]
    fitted: torch.Tensor = torch.linalg.solve(regularized(rows[:, kept], ridge), rows @ down.double().T)
    return fitted.T


def regularized(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return ``C + r I``, with ``r`` relative to the mean of C's diagonal."""
    mean = gram.diagonal().mean()
    return gram + ridge * (mean if mean > 0 else 1.0) * torch.eye(len(gram), dtype=gram.dtype)
