"""The K experts of the largest scores plus a bias, whose scores alone are their weights (DeepSeek-V3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.models.own.routing.base import RoutedTokens
from upcycle.models.own.routing.top_k import TopKRule

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BiasedTopKRule(TopKRule):
    """Top-k as stock classes of sigmoid routers have it: what the choice adds to the scores, their weights do not see.

    The weights are ``factor * score / (sum of the chosen + epsilon)``, or ``factor * score`` unless ``normalized``.

    Attributes:
        biased: whether the router holds a bias, ``e_score_correction_bias`` ``[E]``, for the choice.
        factor: multiplies all weights.
        epsilon: see above.
    """

    name, title, paper = "biased_top_k", "top-k with a bias on the choice", "https://arxiv.org/abs/2412.19437"

    biased: bool = True
    factor: float = 1.0
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores == "ones":
            raise ValueError("'scores' must be softmax or sigmoid, got 'ones'")
        if type(self.biased) is not bool:
            raise ValueError(f"'biased' must be true or false, got {self.biased!r}")
        for name, value, least in (("factor", self.factor, "positive"), ("epsilon", self.epsilon, "not negative")):
            number = isinstance(value, int | float) and not isinstance(value, bool) and value < float("inf")
            if not number or value < 0 or (value == 0 and name == "factor"):
                raise ValueError(f"'{name}' must be a {least} number, got {value!r}")

    def sums_to_one(self, experts: int) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return self.normalized and self.factor == 1 and self.epsilon == 0

    def equal_weight(self, experts: int) -> float:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        score = 1 / experts if self.scores == "softmax" else 0.5
        return self.factor * (score / (score * self.top_k + self.epsilon) if self.normalized else score)

    def all_alike(self, experts: int, equal_logits: bool) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return self.top_k == experts and equal_logits

    @property
    def says(self) -> str:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return f"the {self.top_k} with the largest scores" + (", after a bias is added" if self.biased else "")

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None = None) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`; ``bias`` ``[E]`` is added for the choice alone."""
        scores = logits.softmax(-1) if self.scores == "softmax" else logits.sigmoid()
        preferred = scores if bias is None else scores + bias.to(scores.dtype)
        experts = preferred.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.normalized:
            weights = weights / (weights.sum(-1, keepdim=True) + self.epsilon)
        return RoutedTokens(experts, self.factor * weights)
