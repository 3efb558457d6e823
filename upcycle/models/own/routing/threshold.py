"""All experts whose share of the softmax passes a threshold (DS-MoE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.models.own.routing.base import RoutedTokens, RouterRule, weighted

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ThresholdRule(RouterRule):
    """Experts run where E times their softmax is above ``threshold``, at that weight: a router of equal logits weighs all by 1.

    The paper weighs by the softmax itself. The factor E, which a down projection could hold as well, makes the pieces of a split
    FFN add up to it before anything is trained.

    Attributes:
        threshold: 0 runs every expert. From 1 on, a token may have none.
    """

    name, title, paper = "threshold", "threshold", "https://arxiv.org/abs/2404.05567"

    threshold: float = 0.48

    def __post_init__(self) -> None:
        value = self.threshold
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ValueError(f"'threshold' must be a number that is not negative, got {value!r}")

    def sums_to_one(self, experts: int) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return False

    def equal_weight(self, experts: int) -> float:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return 1.0

    def all_alike(self, experts: int, equal_logits: bool) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return equal_logits and self.threshold < 1

    @property
    def says(self) -> str:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return f"those whose softmax times the number of experts is above {self.threshold:g}"

    def route(self, logits: torch.Tensor) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        shares = logits.softmax(-1) * logits.shape[-1]
        return weighted(shares, shares > self.threshold)
