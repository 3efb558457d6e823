"""The K experts of the largest scores, without those that weigh much less than the first (dynamic skipping)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from upcycle.models.own.routing.base import RoutedTokens
from upcycle.models.own.routing.biased_top_k import BiasedTopKRule


@dataclass(frozen=True)
class SkipRule(BiasedTopKRule):
    """Top-k, of which those experts are left out whose weight is below ``beta`` times the token's largest (arXiv 2402.14800).

    Where weights are normalised, those that are left may be divided by their own sum again, so that the whole weight of a token stays.
    The expert of the largest weight always runs. 0 leaves out none, and is top-k; 1 leaves one, but for equal weights.

    Attributes:
        beta: from 0 to 1.
        rescaled: whether normalised weights are, after some were left out; else those that are left weigh what they did.
        protected: the share of a sequence's tokens, the most important ones, that keep all their experts (arXiv 2410.06270); 0: no
            token is looked at. What makes a token important is how later ones attend to it, in what one call reads: a token that is
            written with a cache has none yet, and is not protected.
    """

    name, title, paper = "skip", "dynamic skipping", "https://arxiv.org/abs/2402.14800"

    biased: bool = False
    beta: float = 0.0
    rescaled: bool = True
    protected: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.beta, bool) or not isinstance(self.beta, int | float) or not 0 <= self.beta <= 1:
            raise ValueError(f"'beta' must be a number from 0 to 1, got {self.beta!r}")
        if type(self.rescaled) is not bool:
            raise ValueError(f"'rescaled' must be true or false, got {self.rescaled!r}")
        share = self.protected
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(f"'protected' must be a number from 0 to less than 1, got {share!r}")

    def sums_to_one(self, experts: int) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return super().sums_to_one(experts) and (self.rescaled or self.beta == 0)

    @property
    def says(self) -> str:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        kept = f", and all of the {self.protected:.0%} of tokens that get most attention" if self.protected else ""
        return f"of {super().says}, those that weigh at least {self.beta:g} times the first{kept}"

    def important(self, importance: torch.Tensor) -> torch.Tensor:
        """Return which tokens are protected, boolean like ``importance`` ``[B, n]``: the share of each sequence, rounded up.

        A token of importance 0, which no later one has seen, is not.
        """
        count = math.ceil(self.protected * importance.shape[-1] - 1e-9)
        places = importance.argsort(dim=-1, descending=True, stable=True)[..., :count]
        return torch.zeros_like(importance, dtype=torch.bool).scatter(-1, places, True) & (importance > 0)

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None = None, protected: torch.Tensor | None = None
    ) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`; ``bias`` ``[E]`` is added for the choice alone.

        Tokens that are ``protected``, boolean ``[T]``, keep all K.
        """
        experts, weights = super().route(logits, bias)
        left = weights >= self.beta * weights.amax(-1, keepdim=True)
        if protected is not None:
            left = left | protected[:, None]
        kept = weights.masked_fill(~left, 0.0)
        if self.normalized and self.rescaled:
            kept = kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
        # Where all stay the weights are top-k's, bit for bit: their sum over itself is 1.
        return RoutedTokens(experts.masked_fill(~left, logits.shape[-1]), kept)
