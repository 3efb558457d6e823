"""Mutual-information loss: balanced experts, and tokens with a clear choice. T tokens, E experts."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.trainers.distributed.reduction import counted, token_count
from upcycle.trainers.losses.base import Loss, LossParameters
from upcycle.trainers.routing.router_records import RouterRecord


class MutualInformationParameters(LossParameters):
    """Parameters of :class:`MutualInformation`."""

    coefficient: float = Field(
        4e-4, ge=0, description="what the loss is multiplied by (DS-MoE: 6.3e-4 at 1B, 4e-4 at 3B, 2e-4 at 6B)"
    )


class MutualInformation(Loss):
    """``-H(e) + mean_t H(e | x_t)`` in nats (DS-MoE, arXiv 2404.05567, eq. 4).

    H(e) is the entropy of the mean probabilities over all tokens of all ranks; over few tokens it would be too low. The loss
    ranges from ``-log E``, where every token is certain and all experts are chosen equally often, to 0.
    """

    name = "mutual_information"
    title = "Mutual information of tokens and experts (DS-MoE)"
    paper = "https://arxiv.org/abs/2404.05567"
    Parameters = MutualInformationParameters

    def sums(self, record: RouterRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[E + 2]``: probabilities, the sum of the tokens' entropies, and the number of tokens."""
        p = record.probabilities
        return torch.cat([counted(p, mask), counted(_entropy(p)[:, None], mask), token_count(p, mask)])

    def value(self, sums: torch.Tensor, record: RouterRecord) -> torch.Tensor:
        """One layer's loss, a scalar, from its sums over all tokens."""
        probabilities, entropies, tokens = sums.split([len(sums) - 2, 1, 1])
        tokens = tokens.clamp(min=1)
        mean: torch.Tensor = entropies / tokens
        return mean.squeeze() - _entropy(probabilities / tokens)


def _entropy(p: torch.Tensor) -> torch.Tensor:
    """The entropy over the last dimension in nats. 0 log 0 is 0, with a finite gradient."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum(-1)
