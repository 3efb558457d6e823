"""The K experts of the largest scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from upcycle.models.own.routing.base import RoutedTokens, RouterRule

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TopKRule(RouterRule):
    """Softmax over all experts (or a sigmoid of each), then the K largest, whose weights may be divided by their sum.

    With equal logits all weights are equal, so that ``normalized`` with K = E is a plain mean of the experts.

    Attributes:
        top_k: experts per token.
        scores: what turns logits into scores.
        normalized: whether the chosen experts' weights are divided by their sum.
    """

    name, title, paper = "top_k", "top-k", "https://arxiv.org/abs/2401.04088"

    top_k: int = 2
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = True

    def __post_init__(self) -> None:
        if type(self.top_k) is not int or self.top_k < 1:
            raise ValueError(f"'top_k' must be a positive integer, got {self.top_k!r}")
        if self.scores not in ("softmax", "sigmoid"):
            raise ValueError(f"'scores' must be softmax or sigmoid, got {self.scores!r}")
        if type(self.normalized) is not bool:
            raise ValueError(f"'normalized' must be true or false, got {self.normalized!r}")

    @property
    def sums_to_one(self) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return self.normalized

    def check(self, experts: int) -> str | None:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return f"'top_k' is {self.top_k}, and there are {experts} experts" if self.top_k > experts else None

    def most_experts(self, experts: int) -> int:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return self.top_k

    def route(self, logits: torch.Tensor) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        scores = logits.softmax(-1) if self.scores == "softmax" else logits.sigmoid()
        weights, experts = scores.topk(self.top_k, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        return RoutedTokens(experts, weights)
