"""BTX's other routers: all experts at the weight of their probability, or one drawn by Gumbel noise. T tokens, E experts."""

from __future__ import annotations

import math

import torch

from upcycle.errors import UsageError
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.routing_rule import RoutingRule
from upcycle.trainers.routing.stock_routers import MoeLayer


def check_choice(options: ControlParameters, layer: MoeLayer) -> str | None:
    """Refuse a router variant that a model cannot export.

    Returns:
        What the exported model will do otherwise; ``None``: it does the same.

    Raises:
        UsageError: see above.
    """
    rule = layer.rule
    if options.choice in ("top_k", "expert_choice"):
        return None
    if rule.constant is not None or rule.bias() is not None:
        raise UsageError(
            f"control.choice: {options.choice}: these routers choose by a bias, or weigh experts by no score",
            hint="leave it out, or convert to another target",
        )
    if options.choice == "sample":
        if rule.top_k != 1 or not rule.normalized or rule.factor != 1:
            raise UsageError(
                f"control.choice: sample trains one expert per token, which then weighs 1, and this model runs {rule.top_k} per token"
                + ("" if rule.normalized else ", whose weights are not divided by their sum"),
                hint="convert with --top-k 1 --target mixtral, or another target that normalises weights",
            )
        if options.soft_first and not options.accept_unexported:
            raise UsageError(
                "control.soft_first: the exported model runs one expert per token in its first MoE layer, too",
                hint="leave it out, or set accept_unexported: true",
            )
        if not options.soft_first:
            return None
        return (
            "soft_first acts in training and validation; the exported model's first MoE layer runs one expert per token"
        )
    if rule.top_k == rule.experts and rule.normalized:
        return None
    if not options.accept_unexported:
        raise UsageError(
            f"control.choice: soft runs all {rule.experts} experts, and the exported model runs {rule.top_k} per token",
            hint=f"convert with --top-k {rule.experts}, or set accept_unexported: true",
        )
    return f"choice: soft acts in training and validation; the exported model runs {rule.top_k} of {rule.experts} experts per token"


def soft(rule: RoutingRule, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids ``[T, E]`` of all experts: their probabilities for logits ``[T, E]`` (BTX, arXiv 2403.07816, section 2.2)."""
    experts = torch.arange(rule.experts, device=logits.device).expand(len(logits), -1)
    return rule.factor * rule.probabilities(logits), experts


def sampled_top_1(
    logits: torch.Tensor, exponential: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids ``[T, 1]``: the largest entry of ``softmax((z + g) / tau)``, g from Gumbel's distribution.

    BTX's Sample-Top-1 (arXiv 2403.07816): what a Gumbel softmax (arXiv 1611.01144) gives the one expert that has most of it.

    Args:
        logits: z, ``[T, E]``.
        exponential: draws from the exponential distribution, ``[T, E]``; g is minus their logarithm.
        temperature: tau.
    """
    gumbel = -exponential.clamp(min=torch.finfo(logits.dtype).tiny).log()
    weights, experts = ((logits + gumbel) / temperature).softmax(-1).max(-1, keepdim=True)
    return weights, experts


def temperature_of(step: int, rate: float, least: float) -> float:
    """``max(least, exp(-rate * step))``: 0.5 and 1e-4 in BTX (which prints ``-rt``), as Gumbel softmax is annealed."""
    return max(least, math.exp(-rate * step))
