"""All experts whose predicted output is not much smaller than the largest (D2DMoE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.models.own.routing.base import RoutedTokens, RouterRule, weighted

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DynamicKRule(RouterRule):
    """The router predicts the norm of every expert's output; experts of at least ``tau`` times the largest one run, at weight 1.

    A norm is not negative: as in the paper's routers, the prediction is the absolute value of the logit. ``tau`` is the paper's:
    0 runs every expert, 1 only the best. (The authors' code calls ``1 - tau`` by this name.) The weights are constants, so
    that the output gives the router no gradient: it is trained to predict norms.

    Attributes:
        tau: from 0 to 1.
    """

    name, title, paper = "dynamic_k", "dynamic-k", "https://arxiv.org/abs/2310.04361"

    compares_norms = True

    tau: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not 0 <= self.tau <= 1:
            raise ValueError(f"'tau' must be a number from 0 to 1, got {self.tau!r}")

    def sums_to_one(self, experts: int) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return False

    def equal_weight(self, experts: int) -> float:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return 1.0

    def all_alike(self, experts: int, equal_logits: bool) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return equal_logits or self.tau == 0

    @property
    def says(self) -> str:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return f"those with at least {self.tau:g} times the largest predicted norm"

    def route(self, logits: torch.Tensor) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        norms = logits.abs()
        active = norms >= self.tau * norms.amax(-1, keepdim=True)
        return weighted(active.to(logits.dtype), active)
