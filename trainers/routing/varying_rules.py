"""Rules of ``upcycle_moe`` by which every token has as many experts as its logits say, as training reads them. T tokens, E experts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.causal_choice import CausalChoiceRule
from upcycle.models.own.routing.relu import ReluRule
from upcycle.models.own.routing.threshold import ThresholdRule
from upcycle.trainers.routing.routing_rule import RoutingRule, widened

# dynamic_k is not here: its logits are predicted norms, which losses on routers would move away from what they predict.
_READ = (ReluRule, ThresholdRule, CausalChoiceRule)


@dataclass(frozen=True)
class VaryingRule(RoutingRule):
    """A rule under which K is E, and the id E in the place of an expert stands for none.

    Scores are what the weights are before any expert is left out: ReLU's outputs (ReMoE), or the softmax of all logits (DS-MoE, and
    expert choice that is predicted).
    Probabilities are their shares; of a token without any, 0.
    """

    own: RouterRule = field(default_factory=ReluRule)

    @property
    def varies(self) -> bool:
        """True."""
        return True

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """``[T, E]`` in at least fp32."""
        return widened(logits).relu() if isinstance(self.own, ReluRule) else super().scores(logits)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """``[T, E]``, rows summing to 1, or to 0 where no expert runs."""
        scores = self.scores(logits)
        return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)

    def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and experts ``[T, E]``."""
        routed = self.own.route(logits)
        return routed.weights, routed.experts


def varying_rule(own: RouterRule, experts: int) -> VaryingRule | None:
    """How training reads a rule; ``None``: it does not."""
    if not isinstance(own, _READ):
        return None
    return VaryingRule("softmax", experts, experts, normalized=False, own=own)
