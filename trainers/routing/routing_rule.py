"""What turns a router's logits into experts and weights. T tokens, E experts, K top-k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from upcycle.architectures.moe.base import Score
from upcycle.models.own.routing.standardized import normalized_logits


@dataclass(frozen=True)
class RoutingRule:
    """What turns logits into choices: scores, a bias that only the choice sees, and how the chosen scores become weights.

    The weights are ``factor * score / (sum of the chosen + epsilon)`` where ``normalized``, else ``factor * score``. A
    softmax of the top-k logits is the same as a normalised top-k of the softmax. ``constant`` is what every chosen expert
    weighs where no score matters. Where there is a ``spread``, the model itself normalises logits (Skywork-MoE). Logits are
    divided by ``temperature`` before anything else.
    """

    score: Score
    experts: int
    top_k: int
    normalized: bool = True
    factor: float = 1.0
    epsilon: float = 0.0
    constant: float | None = None
    spread: float | None = None
    temperature: float = 1.0
    # Returns [E] or None. Asked for every time, as casting a model replaces its buffers.
    bias: Callable[[], torch.Tensor | None] = lambda: None

    @property
    def varies(self) -> bool:
        """Whether tokens have different numbers of experts; K is then E, and the id E stands for none."""
        return False

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """``[T, E]`` in at least fp32: the softmax, or the sigmoid of every logit."""
        wide = widened(logits)
        if self.spread is not None:
            wide = normalized_logits(wide, self.spread)
        if self.temperature != 1:
            wide = wide / self.temperature
        return wide.softmax(-1) if self.score == "softmax" else wide.sigmoid()

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """``[T, E]``, rows summing to 1: the softmax, or sigmoids divided by their sum (DeepSeek-V3, arXiv 2412.19437, eq. 19)."""
        scores = self.scores(logits)
        return scores if self.score == "softmax" else scores / scores.sum(-1, keepdim=True)

    def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and experts ``[T, K]`` for logits that are not the model's own; largest first."""
        scores = self.scores(logits)
        bias = self.bias()
        preferred = scores.detach() if bias is None else scores.detach() + bias.flatten()
        experts = preferred.topk(self.top_k, dim=-1).indices
        return self.weigh(scores, experts), experts

    def weigh(self, scores: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Weights ``[T, K]`` of chosen experts, from all scores ``[T, E]``."""
        weights = scores.gather(1, experts)
        if self.constant is not None:
            return torch.full_like(weights, self.constant)
        if self.normalized:
            weights = weights / (weights.sum(-1, keepdim=True) + self.epsilon)
        return self.factor * weights


def widened(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp32, or in fp64 if it is."""
    return x if x.dtype == torch.float64 else x.float()
