"""Teaches a causal router to predict, from the token alone, which experts choose it."""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn.functional import binary_cross_entropy_with_logits

from upcycle.errors import UsageError
from upcycle.models.own.routing.causal_choice import predicted_choices
from upcycle.trainers.distributed.reduction import counted, token_count
from upcycle.trainers.losses.base import Loss, LossParameters
from upcycle.trainers.routing.router_records import RouterRecord
from upcycle.trainers.routing.routing_rule import widened


class ChoicePredictionParameters(LossParameters):
    """Parameters of :class:`ChoicePrediction`."""

    coefficient: float = Field(
        1.0, ge=0, description="what the loss is multiplied by; it reaches nothing but the predictors"
    )


class ChoicePrediction(Loss):
    """``mean_t 1/E sum_e BCE(sigmoid(log(E p_te) + w_e x_t + b_e), [e takes t])`` (Mixture-of-Depths, arXiv 2404.02258, section 3.5).

    Who takes whom is decided by expert choice, among the tokens of a row. Neither x nor the router's probabilities p get a gradient:
    the model itself trains as it would without this loss, as by the paper's second way. (There the predictor is a small MLP, and
    there is one expert.)
    """

    name = "choice_prediction"
    title = "Cross-entropy of predicted expert choice (Mixture-of-Depths)"
    paper = "https://arxiv.org/abs/2404.02258"
    Parameters = ChoicePredictionParameters

    def sums(self, record: RouterRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[2]``: the tokens' cross-entropies, and the number of tokens.

        Raises:
            UsageError: no expert choice is predicted in this pass.
        """
        if record.correction is None:
            raise UsageError(
                "losses.choice_prediction: it teaches routers to predict expert choice, and here experts do not choose",
                hint="set control: {choice: expert_choice} beside it, for a model converted with --target upcycle_moe --routing "
                "causal_choice",
            )
        odds = predicted_choices(widened(record.logits).detach(), record.correction)
        each = binary_cross_entropy_with_logits(odds, record.chosen.to(odds.dtype), reduction="none").mean(
            1, keepdim=True
        )
        return torch.cat([counted(each, mask), token_count(each, mask)])

    def value(self, sums: torch.Tensor, record: RouterRecord) -> torch.Tensor:
        """One layer's loss, a scalar, from its sums over all tokens."""
        return sums[0] / sums[1].clamp(min=1)

    def mean_over(self, mask: torch.Tensor) -> torch.Tensor:
        """The number of tokens that count, ``[1]``."""
        return mask.sum().view(1)
