"""Every expert takes the tokens of its largest scores (expert choice)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from upcycle.models.own.routing.base import RoutedTokens, RouterRule, weighted


@dataclass(frozen=True)
class ExpertChoiceRule(RouterRule):
    """Softmax over all experts; each expert then takes the ``ceil(n c / E)`` of n tokens that have the largest scores for it.

    All experts are equally loaded. A token may be taken by several experts, or by none: it then gets nothing from them. Which ones
    take it depends on the tokens before and behind it, so that a model that writes token by token cannot follow this rule: what it
    has read would be routed anew with each token.

    Padding is no token: it is never taken, and n does not count it. A sequence's output is then that of the sequence alone.

    Attributes:
        capacity_factor: c, how many experts take a token, in the mean; from E on all do.
        group: what the n tokens are: those of a ``sequence``, or (as in the paper, where a token's output depends on what else is in
            the batch) of the whole ``batch``.
        normalized: whether the weights of a token are divided by their sum, as Sparse Upcycling's vision models do
            (arXiv 2212.05055); else they are the scores, as in the paper.
    """

    name, title, paper = "expert_choice", "expert choice", "https://arxiv.org/abs/2202.09368"
    per_token = False

    capacity_factor: float = 2.0
    group: Literal["sequence", "batch"] = "sequence"
    normalized: bool = True

    def __post_init__(self) -> None:
        value = self.capacity_factor
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"'capacity_factor' must be a positive number, got {value!r}")
        if self.group not in ("sequence", "batch"):
            raise ValueError(f"'group' must be sequence or batch, got {self.group!r}")
        if type(self.normalized) is not bool:
            raise ValueError(f"'normalized' must be true or false, got {self.normalized!r}")

    def sums_to_one(self, experts: int) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`; a softmax over experts that all take the token does, too."""
        return self.capacity_factor >= experts

    def equal_weight(self, experts: int) -> float:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return 1 / experts

    def all_alike(self, experts: int, equal_logits: bool) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return equal_logits and self.capacity_factor >= experts

    @property
    def says(self) -> str:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return f"those that have the token among their best: {self.capacity_factor:g} of them take it in the mean"

    def check(self, experts: int) -> str | None:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        if self.capacity_factor <= experts:
            return None
        return f"'capacity_factor' is {self.capacity_factor:g}, and only {experts} experts can take a token"

    def mean_experts(self, experts: int) -> float:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`; shares are rounded up to whole tokens."""
        return min(self.capacity_factor, float(experts))

    def route(self, logits: torch.Tensor) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`; the tokens are those of one sequence."""
        return self.route_sequences(logits, len(logits))

    def route_sequences(self, logits: torch.Tensor, length: int, real: torch.Tensor | None = None) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        tokens, experts = logits.shape
        if not tokens:
            return weighted(logits, logits > 0)
        scores = logits.softmax(-1)
        own = scores.detach().view(-1, tokens if self.group == "batch" else length, experts)
        if real is None:
            counts = own.new_full((len(own), 1, 1), own.shape[1], dtype=torch.float64)
        else:
            there = (real != 0).view(len(own), -1, 1)
            own, counts = own.masked_fill(~there, -1.0), there.sum(1, keepdim=True).double()
        # Less than any fraction that there is: products that are whole numbers may come out slightly above them.
        room = (counts * self.capacity_factor / experts - 1e-9).ceil()
        places = own.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        active = (places < torch.minimum(room, counts)).view_as(scores)
        if self.normalized:
            sums = scores.masked_fill(~active, 0.0).sum(-1, keepdim=True)
            scores = scores / sums.masked_fill(sums == 0, 1.0)
        return weighted(scores, active)
