"""Router z-loss: keeps the router's logits small."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.trainers.distributed.reduction import counted, token_count
from upcycle.trainers.losses.base import Loss, LossParameters
from upcycle.trainers.routing.router_records import RouterRecord
from upcycle.trainers.routing.routing_rule import widened


class RouterZParameters(LossParameters):
    """Parameters of :class:`RouterZ`."""

    coefficient: float = Field(0.001, ge=0, description="what the loss is multiplied by")


class RouterZ(Loss):
    """``mean_t (logsumexp_i z_ti)^2`` on fp32 logits, before noise (ST-MoE, arXiv 2202.08906, eq. 5).

    It is 0 where the exponentials of every token's logits add up to 1, not where the logits are 0. NVIDIA (arXiv 2410.07524) saw
    no effect of a coefficient of 1e-3 after upcycling. With normalised logits it has none.
    """

    name = "router_z"
    title = "Router z-loss (ST-MoE)"
    paper = "https://arxiv.org/abs/2202.08906"
    Parameters = RouterZParameters

    def sums(self, record: RouterRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[2]``: the sum of the squares, and the number of tokens."""
        squares = widened(record.logits).logsumexp(-1, keepdim=True).square()
        return torch.cat([counted(squares, mask), token_count(squares, mask)])

    def value(self, sums: torch.Tensor, record: RouterRecord) -> torch.Tensor:
        """One layer's loss, a scalar, from its sums over all tokens."""
        return sums[0] / sums[1].clamp(min=1)

    def mean_over(self, mask: torch.Tensor) -> torch.Tensor:
        """The number of tokens that count, ``[1]``."""
        return mask.sum().view(1)
