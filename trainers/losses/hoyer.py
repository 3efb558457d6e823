"""Square Hoyer loss: few active neurons per token, before a dense model is split. T tokens, F neurons."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from upcycle.trainers.distributed.reduction import counted, token_count
from upcycle.trainers.losses.base import Loss, LossParameters
from upcycle.trainers.routing.neuron_records import ActivationRecord
from upcycle.trainers.routing.stock_routers import widened


class HoyerParameters(LossParameters):
    """Parameters of :class:`Hoyer`."""

    coefficient: float = Field(
        1e-4, ge=0, description="what the loss is multiplied by (D2DMoE: 1e-4 to 1e-3 for Gemma)"
    )
    layers: Literal["sum", "mean"] = Field(
        "mean", description="whether layers are added up, or averaged as in the paper"
    )
    of: Literal["activations", "preactivations"] = Field(
        "activations",
        description="the activated gate branch (for ReLU), or what goes into it, shifted and clamped at `clamp` (for GELU)",
    )
    clamp: float = Field(-10.0, lt=0, description="preactivations: max(z, clamp) - clamp is made sparse")


class Hoyer(Loss):
    """``mean_t ||a_t||_1^2 / (||a_t||_2^2 + 1e-15)``, from 1 to F: the number of neurons if all are equal.

    D2DMoE (arXiv 2310.04361), its sparsifying stage. Per token over the neurons, never over a flattened batch. In gated
    FFNs a is the gate branch. Their ramps of the coefficient are ``ramp``: 0 constant, 1 linear, 0.5 over the first half.
    """

    name = "hoyer"
    title = "Square Hoyer sparsity of a dense FFN (D2DMoE)"
    paper = "https://arxiv.org/abs/2310.04361"
    reads = "activations"
    Parameters = HoyerParameters
    parameters: HoyerParameters

    def sums(self, record: ActivationRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[2]``: the tokens' values and their number."""
        if self.parameters.of == "activations":
            a = widened(record.after).abs()
        else:
            a = widened(record.before).clamp(min=self.parameters.clamp) - self.parameters.clamp
        values = a.sum(-1, keepdim=True).square() / (a.square().sum(-1, keepdim=True) + 1e-15)
        return torch.cat([counted(values, mask), token_count(values, mask)])

    def value(self, sums: torch.Tensor, record: ActivationRecord) -> torch.Tensor:
        """One layer's."""
        return sums[0] / sums[1].clamp(min=1)

    def mean_over(self, mask: torch.Tensor) -> torch.Tensor:
        """Tokens."""
        return mask.sum().view(1)
