"""Gives routers the gradient that they would have if every expert ran, while the chosen ones alone make the output.

T tokens, E experts, K top-k, d.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from upcycle.errors import UsageError
from upcycle.models.own.lora_block import LoraBlock
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.routing_rule import RoutingRule
from upcycle.trainers.routing.stock_routers import MoeLayer


def check_dense_gradients(options: ControlParameters, layer: MoeLayer) -> None:
    """Refuse dense gradients where they mean nothing, or where something else decides what experts weigh.

    Raises:
        UsageError: see above.
    """
    key = "control.dense_gradients"
    if options != ControlParameters(dense_gradients=True, jitter=options.jitter):
        raise UsageError(
            f"{key}: what the router says of every expert is what teaches it, and noise, capacity and the like change what it says",
            hint="of control's keys, jitter goes with it",
        )
    if layer.rule.constant is not None:
        raise UsageError(
            f"{key}: experts of this model always weigh {layer.rule.constant:g}, so that no router has a gradient, dense or not",
            hint="leave it out",
        )
    if isinstance(layer.block, LoraBlock):
        raise UsageError(
            f"{key}: experts of low rank are no part of their own, whose outputs could be asked for one by one",
            hint="leave it out",
        )


def attach_dense_gradients(layer: MoeLayer) -> list[Any]:
    """Act on one layer from now on, in training; returns the handles of its hooks.

    DenseMixer (Yao et al. 2025): the output is ``y = sum over the chosen of w_e E_e(x)``, and the router's gradient that of
    ``sum over all of p_e E_e(x)``, p being the weights that the same rule gives with K = E. What experts and the rest of the model
    get is as ever: of experts the chosen ones alone are taught, by their weights w. Where a rule divides the chosen weights by their
    sum, p is divided by that of all (the softmax itself).

    The experts run a second time, all E of them, forwards and for the gradient of p.
    """
    held: dict[str, Any] = {"inside": False}

    def remember(router: nn.Module, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        held["logits"] = output[0] if router.training and torch.is_grad_enabled() else None

    def constant(experts: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if held["inside"] or held.get("logits") is None:
            return inputs
        x, ids, weights = inputs
        return x, ids, weights.detach()

    def added(experts: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if held["inside"] or held.get("logits") is None:
            return output
        x, _, weights = inputs
        logits = held.pop("logits")
        held["inside"] = True
        try:
            every = dense_output(experts, x, dense_weights(layer.rule, logits).to(weights.dtype))
        finally:
            held["inside"] = False
        return output + (every - every.detach()).to(output.dtype)

    return [
        layer.router.register_forward_hook(remember),
        layer.experts.register_forward_pre_hook(constant),
        layer.experts.register_forward_hook(added),
    ]


def dense_weights(rule: RoutingRule, logits: torch.Tensor) -> torch.Tensor:
    """What every expert would weigh if all ran, ``[T, E]``, for logits ``[T, E]``."""
    whole = replace(rule, top_k=rule.experts)
    every = torch.arange(rule.experts, device=logits.device).expand(len(logits), rule.experts)
    return whole.weigh(whole.scores(logits), every)


def dense_output(experts: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighed outputs ``[T, d]`` of all experts, of which only ``weights`` ``[T, E]`` get a gradient."""
    fixed = {name: parameter.detach() for name, parameter in experts.named_parameters()}
    every = torch.arange(weights.shape[1], device=x.device).expand(weights.shape)
    out: torch.Tensor = functional_call(experts, fixed, (x.detach(), every, weights))
    return out
