"""Square Hoyer loss: makes few neurons active per token, before a dense model is split. T tokens, F neurons."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from upcycle.trainers.distributed.reduction import counted, token_count
from upcycle.trainers.losses.base import Loss, LossParameters
from upcycle.trainers.routing.neuron_records import ActivationRecord
from upcycle.trainers.routing.routing_rule import widened


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
        description="the activated gate branch (for ReLU), or its input, clamped at `clamp` and shifted (for GELU)",
    )
    clamp: float = Field(-10.0, lt=0, description="preactivations: the loss is taken of max(z, clamp) - clamp")


class Hoyer(Loss):
    """``mean_t ||a_t||_1^2 / (||a_t||_2^2 + 1e-15)``, from 1 to F: the number of active neurons, if those are equally active.

    The loss of D2DMoE's sparsifying stage (arXiv 2310.04361). Norms are over the neurons of each token, never over a flattened
    batch. In gated FFNs, a is the gate branch. The paper's ways to raise the coefficient are values of ``ramp``: 0 is constant,
    1 is linear, 0.5 is linear over the first half.
    """

    name = "hoyer"
    title = "Square Hoyer sparsity of a dense FFN (D2DMoE)"
    paper = "https://arxiv.org/abs/2310.04361"
    reads = "activations"
    Parameters = HoyerParameters
    parameters: HoyerParameters

    def sums(self, record: ActivationRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[2]``: the sum of the tokens' values, and their number."""
        if self.parameters.of == "activations":
            a = widened(record.after).abs()
        else:
            a = widened(record.before).clamp(min=self.parameters.clamp) - self.parameters.clamp
        values = a.sum(-1, keepdim=True).square() / (a.square().sum(-1, keepdim=True) + 1e-15)
        return torch.cat([counted(values, mask), token_count(values, mask)])

    def value(self, sums: torch.Tensor, record: ActivationRecord) -> torch.Tensor:
        """One layer's loss, a scalar, from its sums over all tokens."""
        return sums[0] / sums[1].clamp(min=1)

    def mean_over(self, mask: torch.Tensor) -> torch.Tensor:
        """The number of tokens that count, ``[1]``."""
        return mask.sum().view(1)
