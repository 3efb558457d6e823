"""Importance loss: the experts' summed weights should vary little. T tokens, E experts."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from upcycle.trainers.distributed.reduction import counted
from upcycle.trainers.losses.base import Loss, LossParameters
from upcycle.trainers.routing.router_records import RouterRecord


class CV2Parameters(LossParameters):
    """Parameters of the two losses that are a squared coefficient of variation."""

    unbiased: bool = Field(True, description="divide the variance by E - 1 (LLaMA-MoE), or by E (vision MoE)")


class ImportanceCV2Parameters(CV2Parameters):
    """Parameters of :class:`ImportanceCV2`."""

    of: Literal["weights", "probabilities"] = Field(
        "weights",
        description="what is summed: weights after top-k (Shazeer, LLaMA-MoE) or all probabilities (vision MoE)",
    )


class ImportanceCV2(Loss):
    """``Var / Mean^2`` over experts of ``sum_t G_ti`` (Shazeer et al. 2017, section 4; LLaMA-MoE, arXiv 2406.16554).

    G are the weights before any choice is dropped. It is 0 where all experts have the same weight in total. The default
    coefficient is LLaMA-MoE's.
    """

    name = "importance_cv2"
    title = "Importance, squared coefficient of variation (Shazeer, LLaMA-MoE)"
    paper = "https://arxiv.org/abs/1701.06538"
    Parameters = ImportanceCV2Parameters
    parameters: ImportanceCV2Parameters

    def sums(self, record: RouterRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[E]``: each expert's importance."""
        if self.parameters.of == "probabilities":
            return counted(record.probabilities, mask)
        return counted(record.gates, mask)

    def value(self, sums: torch.Tensor, record: RouterRecord) -> torch.Tensor:
        """One layer's loss, a scalar, from its sums over all tokens."""
        return squared_variation(sums, self.parameters.unbiased)


def squared_variation(values: torch.Tensor, unbiased: bool) -> torch.Tensor:
    """``Var / Mean^2`` of ``values`` ``[E]``, a scalar; 0 for a single expert, and where all values are 0."""
    if len(values) == 1:
        return 0 * values.sum()
    mean = values.mean()
    return values.var(correction=int(unbiased)) / mean.square().clamp(min=torch.finfo(values.dtype).tiny)
