"""Lets experts choose tokens in training, where a router learns beside it to do without later tokens. T tokens, E experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from upcycle.errors import UsageError
from upcycle.models.own.routing.causal_choice import CausalChoiceRule
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.routing_rule import RoutingRule, widened
from upcycle.trainers.routing.stock_routers import MoeLayer
from upcycle.trainers.routing.varying_rules import VaryingRule


def check_choosing(options: ControlParameters, rule: RoutingRule) -> None:
    """Refuse expert choice where the exported model could not do without it, or where something else changes what it decides.

    Raises:
        UsageError: see above.
    """
    if options.choice != "expert_choice":
        return
    if predicted(rule) is None:
        raise UsageError(
            "control.choice: by expert_choice the experts of a token depend on the tokens behind it; this model's routers do not "
            "learn to predict it, and it could not write text",
            hint="convert with --target upcycle_moe --routing causal_choice",
        )
    if options != ControlParameters(
        choice="expert_choice", jitter=options.jitter, expert_dropout=options.expert_dropout
    ):
        raise UsageError(
            "control: experts choose by what their routers say, and noise, capacity and the like change a choice of top-k",
            hint="of control's keys, jitter and expert_dropout go with choice: expert_choice",
        )


def predicted(rule: RoutingRule) -> CausalChoiceRule | None:
    """The model's own rule, if it predicts expert choice."""
    own = rule.own if isinstance(rule, VaryingRule) else None
    return own if isinstance(own, CausalChoiceRule) else None


def chosen_by_experts(
    rule: RoutingRule, logits: torch.Tensor, real: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids ``[T, E]`` by expert choice, for logits ``[T, E]``; id E is no expert.

    Args:
        rule: a model's that predicts it.
        logits: of whole rows.
        real: bool ``[B, S]``, false at padding, which nobody takes. Experts choose within rows, whatever documents are in one.
            ``None``: all tokens are one row.
    """
    own = predicted(rule)
    assert own is not None
    length, flat = (len(logits), None) if real is None else (real.shape[1], real.reshape(-1).to(logits.device))
    experts, weights = own.chosen_by().route_sequences(widened(logits), length, flat)
    return weights, experts


def keep_corrections(layer: MoeLayer, kept: dict[int, torch.Tensor]) -> Any:
    """Keep what a layer's predictor computes in training, by the layer's index; returns the handle of the hook."""

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        kept.pop(layer.index, None)
        if module.training:
            kept[layer.index] = output

    predictor: nn.Module = layer.router.get_submodule("choice")
    return predictor.register_forward_hook(keep)
