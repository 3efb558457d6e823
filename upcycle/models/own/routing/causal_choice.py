"""All experts that are predicted to choose the token (expert choice, made causal)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from upcycle.models.own.routing.base import RoutedTokens, RouterRule, weighted
from upcycle.models.own.routing.expert_choice import ExpertChoiceRule

_TIE = 1e-6  # experts of equal logits all run, although rounding moves their log odds a little


@dataclass(frozen=True)
class CausalChoiceRule(RouterRule):
    """Experts run that would, by a prediction from the token alone, take it by expert choice (arXiv 2202.09368).

    Of expert choice, only who takes a token looks at other tokens: what experts weigh is the softmax p of the token's own logits,
    divided by the sum of those that run. So that part alone is predicted, as in Mixture-of-Depths' second way (section 3.5):
    expert e runs where ``sigmoid(log(E p_e) + w_e x + b_e)`` is at least ``threshold``. The correction ``w x + b`` is 0 at
    first: experts then run whose share is at least 1/E, the largest among them. Training teaches it
    (:class:`~upcycle.trainers.losses.choice_prediction.ChoicePrediction`), while experts do choose.

    Attributes:
        capacity_factor: how many experts take a token, in the mean, by the expert choice that is predicted.
        threshold: the least probability; 0 runs all experts, by any other a token may have none.
    """

    name, title, paper = "causal_choice", "causal expert choice", "https://arxiv.org/abs/2404.02258"
    predicts_choice = True

    capacity_factor: float = 2.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        self.chosen_by()
        value = self.threshold
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"'threshold' must be a number from 0 to below 1, got {value!r}")

    def chosen_by(self) -> ExpertChoiceRule:
        """Return the rule that is predicted; it looks at whole sequences.

        Raises:
            ValueError: its capacity factor is impossible.
        """
        return ExpertChoiceRule(self.capacity_factor)

    def sums_to_one(self, experts: int) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return self.threshold == 0

    def equal_weight(self, experts: int) -> float:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return 1 / experts

    def all_alike(self, experts: int, equal_logits: bool) -> bool:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return equal_logits and self.threshold <= 0.5  # until something is learnt

    @property
    def says(self) -> str:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        if not self.threshold:
            return "all"
        return f"those predicted to choose the token: {self.capacity_factor:g} of them in the mean, once that is learnt"

    def check(self, experts: int) -> str | None:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`."""
        return self.chosen_by().check(experts)

    def mean_experts(self, experts: int) -> float:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`; it is what training leads to."""
        return self.chosen_by().mean_experts(experts) if self.threshold else float(experts)

    def route(self, logits: torch.Tensor, correction: torch.Tensor | None = None) -> RoutedTokens:
        """See :class:`~upcycle.models.own.routing.base.RouterRule`; ``correction`` ``[T, E]`` is ``w x + b``, and 0 if left out."""
        scores = logits.softmax(-1)
        odds = math.log(self.threshold / (1 - self.threshold)) if self.threshold else -math.inf
        active = predicted_choices(logits.detach(), correction) > odds - _TIE
        sums = scores.masked_fill(~active, 0.0).sum(-1, keepdim=True)
        return weighted(scores / sums.masked_fill(sums == 0, 1.0), active)


def predicted_choices(logits: torch.Tensor, correction: torch.Tensor | None) -> torch.Tensor:
    """Return the log odds that experts take tokens, ``[T, E]`` in the dtype of ``logits``, from logits and corrections ``[T, E]``."""
    own = logits.log_softmax(-1) + math.log(logits.shape[-1])
    return own if correction is None else own + correction.to(own.dtype)


class ChoiceCorrection(nn.Module):
    """The correction of :class:`CausalChoiceRule`: ``w x + b`` ``[T, E]`` for tokens ``[T, d]``, which get no gradient from it.

    Attributes:
        weight: ``[E, d]``, 0 at first.
        bias: ``[E]``, 0 at first.
    """

    def __init__(self, experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return functional.linear(x.detach(), self.weight, self.bias)
