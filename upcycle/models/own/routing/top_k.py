"""The K experts of the largest scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from upcycle.models.own.routing.base import RoutedTokens, RouterRule


@dataclass(frozen=True)
class TopKRule(RouterRule):
    """Softmax over all experts (or a sigmoid of each), then the K largest, whose weights may be divided by their sum.

    With ``ones``, the experts of the K largest logits weigh 1 each, as in MoEfication (arXiv 2110.01786); ``normalized``: 1/K.

    With equal logits all weights are equal, so that ``normalized`` with K = E is a plain mean of the experts.

    Attributes:
        top_k: experts per token.
        scores: what turns logits into scores.
        normalized: whether the chosen experts' weights are divided by their sum.
    """

    name, title, paper = "top_k", "top-k", "https://arxiv.org/abs/2401.04088"

    top_k: int = 2
    scores: Literal["softmax", "sigmoid", "ones"] = "softmax"
    normalized: bool = True

    def __post_init__(self) -> None:
        if type(self.top_k) is not int or self.top_k < 1:
            raise ValueError(f"'top_k' must be a positive integer, got {self.top_k!r}")
        if self.scores not in ("softmax", "sigmoid", "ones"):
            raise ValueError(f"'scores' must be softmax, sigmoid or ones, got {self.scores!r}")
        if type(self.normalized) is not bool:
            raise ValueError(f"'normalized' must be true or false, got {self.normalized!r}")

    def sums_to_one(self, experts: int) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return self.normalized

    def equal_weight(self, experts: int) -> float:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        if self.normalized:
            return 1 / self.top_k
        return {"softmax": 1 / experts, "sigmoid": 0.5, "ones": 1.0}[self.scores]

    def all_alike(self, experts: int, equal_logits: bool) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return self.top_k == experts and (equal_logits or self.scores == "ones")

    @property
    def says(self) -> str:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return "the one with the largest logit" if self.top_k == 1 else f"the {self.top_k} with the largest logits"

    def check(self, experts: int) -> str | None:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return f"'top_k' is {self.top_k}, and there are {experts} experts" if self.top_k > experts else None

    def most_experts(self, experts: int) -> int:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return self.top_k

    def route(self, logits: torch.Tensor) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        if self.scores == "ones":
            experts = logits.topk(self.top_k, dim=-1).indices
            return RoutedTokens(experts, torch.full_like(experts, self.equal_weight(1), dtype=logits.dtype))
        scores = logits.softmax(-1) if self.scores == "softmax" else logits.sigmoid()
        weights, experts = scores.topk(self.top_k, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        return RoutedTokens(experts, weights)
