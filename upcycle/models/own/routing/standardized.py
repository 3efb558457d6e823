"""The K experts of the largest logits, which are brought to one mean and spread before they become weights (Skywork-MoE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.models.own.routing.top_k import TopKRule

if TYPE_CHECKING:
    import torch

    from upcycle.models.own.routing.base import RoutedTokens

_EPSILON = 1e-6  # unsourced in the paper


@dataclass(frozen=True)
class StandardizedTopKRule(TopKRule):
    """Top-k of ``spread * (z - mean(z)) / std(z)``, of every token's logits z, by the population's standard deviation plus 1e-6.

    The larger the spread, the further apart the weights of first and second experts; a router's own scale no longer matters.

    Attributes:
        spread: the standard deviation of every token's logits (the paper's lambda, which is 1).
    """

    name, title, paper = "standardized_top_k", "top-k of normalised logits", "https://arxiv.org/abs/2406.06563"

    spread: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.spread, int | float) and not isinstance(self.spread, bool)
        if not number or not 0 < self.spread < float("inf"):
            raise ValueError(f"'spread' must be a positive number, got {self.spread!r}")
        if self.scores == "ones":
            raise ValueError("'scores' are ones, which no spread of the logits changes")

    @property
    def says(self) -> str:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return f"{super().says}, normalised to the standard deviation {self.spread:g} over a token's experts"

    def route(self, logits: torch.Tensor) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return super().route(normalized_logits(logits, self.spread))


def normalized_logits(logits: torch.Tensor, spread: float) -> torch.Tensor:
    """``spread * (z - mean(z)) / std(z)`` of every row of ``[T, E]`` (Skywork-MoE, arXiv 2406.06563, section 4.1)."""
    centred = logits - logits.mean(-1, keepdim=True)
    return spread * centred / (centred.square().mean(-1, keepdim=True).sqrt() + _EPSILON)
