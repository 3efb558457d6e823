"""The K experts of the largest scores, without those that weigh much less than the first (dynamic skipping)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.models.own.routing.base import RoutedTokens
from upcycle.models.own.routing.biased_top_k import BiasedTopKRule

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SkipRule(BiasedTopKRule):
    """Top-k, of which those experts are left out whose weight is below ``beta`` times the token's largest (arXiv 2402.14800).

    Where weights are normalised, those that are left may be divided by their own sum again, so that the whole weight of a token stays.
    The expert of the largest weight always runs. 0 leaves out none, and is top-k; 1 leaves one, but for equal weights.

    Attributes:
        beta: from 0 to 1.
        rescaled: whether normalised weights are, after some were left out; else those that are left weigh what they did.
    """

    name, title, paper = "skip", "dynamic skipping", "https://arxiv.org/abs/2402.14800"

    biased: bool = False
    beta: float = 0.0
    rescaled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.beta, bool) or not isinstance(self.beta, int | float) or not 0 <= self.beta <= 1:
            raise ValueError(f"'beta' must be a number from 0 to 1, got {self.beta!r}")
        if type(self.rescaled) is not bool:
            raise ValueError(f"'rescaled' must be true or false, got {self.rescaled!r}")

    def sums_to_one(self, experts: int) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return super().sums_to_one(experts) and (self.rescaled or self.beta == 0)

    @property
    def says(self) -> str:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return f"of {super().says}, those that weigh at least {self.beta:g} times the first"

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None = None) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`; ``bias`` ``[E]`` is added for the choice alone."""
        experts, weights = super().route(logits, bias)
        left = weights >= self.beta * weights.amax(-1, keepdim=True)
        kept = weights.masked_fill(~left, 0.0)
        if self.normalized and self.rescaled:
            kept = kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
        # Where all stay the weights are top-k's, bit for bit: their sum over itself is 1.
        return RoutedTokens(experts.masked_fill(~left, logits.shape[-1]), kept)
