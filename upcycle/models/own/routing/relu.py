"""All experts with a positive logit, at that weight (ReMoE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.models.own.routing.base import RoutedTokens, RouterRule, weighted

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ReluRule(RouterRule):
    """``sum_e relu(logit_e) expert_e(x)``: differentiable everywhere but at 0. A token may have no expert.

    With zero router rows and a router bias of 1, all weights are 1.
    """

    name, title, paper = "relu", "ReLU routing", "https://arxiv.org/abs/2412.14711"
    router_bias = 1.0

    def sums_to_one(self, experts: int) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return False

    def equal_weight(self, experts: int) -> float:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return 1.0

    def all_alike(self, experts: int, equal_logits: bool) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return equal_logits

    @property
    def says(self) -> str:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return "those with a positive logit, at that weight"

    def route(self, logits: torch.Tensor) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return weighted(logits.relu(), logits > 0)
