"""Computes which source a text belongs to: the posteriors of the domains, by Bayes, from the sources' likelihoods.

N sequences, T positions in each, S sources. Everything is in logarithms and fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch


def source_posteriors(
    likelihoods: torch.Tensor, prior: Sequence[float], kind: Literal["fixed", "cached"] = "fixed", decay: float = 0.3
) -> torch.Tensor:
    """Return the mean over all positions of ``p(D=j | x_<t)``, proportional to ``p(x_<t | D=j) p(D=j)``: fp64 ``[S]``, sum 1.

    Li et al., arXiv 2208.03306, section 2. At the first position of a sequence no token has been read, and the posterior is
    the prior.

    Args:
        likelihoods: ``ln p(x_t | x_<t, D=j)``, fp64 ``[S, N, T]``.
        prior: ``p(D=j)`` up to a factor; with ``cached``, the one before the first sequence.
        kind: ``fixed``, or ``cached``: after every sequence the prior becomes ``decay`` times itself and ``1 - decay`` times
            the posterior behind the sequence's last token but one, ``p(D=j | x_<T)``.
        decay: the share that the cached prior keeps of itself.
    """
    before = likelihoods.cumsum(-1) - likelihoods
    log_prior = torch.tensor(prior, dtype=torch.float64).log()
    log_prior -= log_prior.logsumexp(0)
    if kind == "fixed":
        posterior = (before + log_prior[:, None, None]).log_softmax(0)
    else:
        sequences = []
        for evidence in before.unbind(1):
            sequences.append((evidence + log_prior[:, None]).log_softmax(0))
            log_prior = torch.logaddexp(log_prior + math.log(decay), sequences[-1][:, -1] + math.log1p(-decay))
        posterior = torch.stack(sequences, dim=1)
    mean = posterior.flatten(1).logsumexp(1) - math.log(before[0].numel())
    return mean.softmax(0)


def largest(weights: torch.Tensor, count: int | None) -> torch.Tensor:
    """Return ``weights`` ``[S]`` with all but the ``count`` largest at 0, scaled to sum 1; of equal ones the first are kept."""
    if count is None or count >= len(weights):
        return weights
    kept = torch.zeros_like(weights)
    chosen = weights.argsort(descending=True, stable=True)[:count]
    kept[chosen] = weights[chosen]
    return kept / kept.sum()
