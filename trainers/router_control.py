"""Changes what stock routers decide while they train: jitter, noisy top-k, normalised logits, capacity.

T tokens, D hidden, E experts, K top-k. All of it acts in training mode alone: an exported model routes as its architecture does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import linear, softplus

from upcycle.errors import UsageError
from upcycle.methods.base import PluginParameters
from upcycle.trainers.routing import MoeLayer, RoutingRule, widened

NOISE_WEIGHT = "noise_weight"  # a parameter of routers with learned noise, [E, D]; no part of the exported model
_NORM_EPSILON = 1e-6


class ControlParameters(PluginParameters):
    """Parameters of :class:`RouterControl`; by default it does nothing."""

    jitter: float = Field(0.0, ge=0, lt=1, description="the router's input is multiplied by U(1 - jitter, 1 + jitter)")
    noise: Literal["none", "fixed", "learned"] = Field(
        "none",
        description="normal noise on the logits: of one size, or of a size learned per token and expert (Shazeer)",
    )
    noise_std: float | None = Field(None, gt=0, description="size of fixed noise [default: 1/E, as vision MoE]")
    noise_floor: float = Field(0.01, ge=0, description="what learned sizes are never below")
    normalize_logits: float | None = Field(
        None, gt=0, description="logits are normalised per token to mean 0 and this standard deviation (Skywork-MoE: 1)"
    )
    accept_unexported: bool = Field(
        False, description="normalise logits although no stock architecture stores that: the exported weights differ"
    )
    capacity_factor: float | None = Field(
        None, gt=0, description="an expert takes this times T K / E tokens, others are dropped [default: none are]"
    )
    drop: Literal["position", "probability"] = Field(
        "position", description="who is dropped: the last tokens, or those of least weight"
    )
    min_capacity: int = Field(4, ge=1, description="an expert takes at least this many tokens")


@dataclass(frozen=True)
class Noise:
    """What was added to the logits for the choice, and its standard deviation, both ``[T, E]``."""

    added: torch.Tensor
    std: torch.Tensor


class RouterControl:
    """Hooks on routers that change their output ``(logits, weights, experts)`` in training mode.

    - jitter: ST-MoE (arXiv 2202.08906), on the router's input only, not on the experts'. One factor per number of the
      input, common to all experts, so virtual groups (arXiv 2410.07524) stay together; noise on logits parts them.
    - learned noise: Shazeer et al. (openreview B1ckMDqlg), ``softplus(W x) + floor`` with W zero at first (the floor is
      LLaMA-MoE's). W is added to the router as ``noise_weight``: attach before the optimizer is made, leave it out of exports.
    - normalised logits: Skywork-MoE (arXiv 2406.06563), by the population's standard deviation plus 1e-6 (unsourced there).
    - capacity: ``ceil(factor T K / E)`` per expert as in Megatron-LM; a dropped choice weighs 0 and the others are not
      renormalised (mesh-tensorflow). The experts still compute it: what is simulated is its absence from the output.
    """

    def __init__(self, parameters: ControlParameters) -> None:
        self.parameters = parameters
        self.noise: dict[int, Noise] = {}  # of the last pass, by layer
        self.kept: dict[int, torch.Tensor] = {}  # bool [T, K], likewise
        self._handles: list[Any] = []

    def attach(self, layer: MoeLayer) -> None:
        """Act on one router from now on.

        Raises:
            UsageError: the architecture cannot express normalised logits, and that was not accepted.
        """
        options, rule = self.parameters, layer.rule
        weights_are_constant = rule.top_k == 1 and rule.normalized
        if options.normalize_logits and not options.accept_unexported and not weights_are_constant:
            raise UsageError(
                "normalize_logits: no stock architecture normalises logits, so the exported model would weigh experts otherwise "
                "than the trained one",
                hint="leave it out, or set accept_unexported: true",
            )
        if options.noise == "learned" and not hasattr(layer.router, NOISE_WEIGHT):
            rows = next(layer.router.parameters())
            layer.router.register_parameter(NOISE_WEIGHT, nn.Parameter(torch.zeros_like(rows)))
        if options.jitter:
            self._handles.append(layer.router.register_forward_pre_hook(self._jitter))
        if options.noise != "none" or options.normalize_logits or options.capacity_factor:
            self._handles.append(layer.router.register_forward_hook(self._hook(layer)))

    def detach(self) -> None:
        """Let every router decide alone again; learned noise weights stay where they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _jitter(self, router: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not router.training:
            return inputs
        hidden, *others = inputs
        epsilon = self.parameters.jitter
        return (hidden * torch.empty_like(hidden).uniform_(1 - epsilon, 1 + epsilon), *others)

    def _hook(self, layer: MoeLayer) -> Callable[..., Any]:
        def hook(router: nn.Module, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
            self.noise.pop(layer.index, None)
            self.kept.pop(layer.index, None)
            return self._decide(layer, inputs[0], output) if router.training else output

        return hook

    def _decide(self, layer: MoeLayer, hidden: torch.Tensor, output: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        options, rule = self.parameters, layer.rule
        logits, weights, experts = output
        dtype, routed = weights.dtype, widened(logits)
        if options.normalize_logits:
            routed = logits = normalized_logits(routed, options.normalize_logits)
        if options.noise != "none":
            std = self._std(layer.router, hidden.reshape(-1, hidden.shape[-1]), routed)
            noise = Noise(torch.randn_like(routed) * std, std)
            self.noise[layer.index], routed = noise, routed + noise.added
        if options.normalize_logits or options.noise != "none":
            weights, experts = rule.route(routed)
        if options.capacity_factor:
            self.kept[layer.index] = kept = within_capacity(weights, experts, rule, options)
            weights = weights * kept
        return logits, weights.to(dtype), experts

    def _std(self, router: nn.Module, hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if self.parameters.noise == "fixed":
            return torch.full_like(logits, self.parameters.noise_std or 1 / logits.shape[1])
        rows: torch.Tensor = getattr(router, NOISE_WEIGHT)
        return softplus(widened(linear(hidden.to(rows.dtype), rows))) + self.parameters.noise_floor


def normalized_logits(logits: torch.Tensor, spread: float) -> torch.Tensor:
    """``spread * (z - mean(z)) / std(z)`` of every row of ``[T, E]`` (Skywork-MoE, arXiv 2406.06563, section 4.1)."""
    centred = logits - logits.mean(-1, keepdim=True)
    return spread * centred / (centred.square().mean(-1, keepdim=True).sqrt() + _NORM_EPSILON)


def within_capacity(
    weights: torch.Tensor, experts: torch.Tensor, rule: RoutingRule, options: ControlParameters
) -> torch.Tensor:
    """Bool ``[T, K]``: which choices their expert has room for."""
    assert options.capacity_factor
    capacity = max(options.min_capacity, math.ceil(experts.numel() / rule.experts * options.capacity_factor))
    chosen = torch.zeros(len(experts), rule.experts, dtype=torch.bool, device=experts.device)
    chosen.scatter_(1, experts, True)
    if options.drop == "position":
        fits = chosen.cumsum(0) <= capacity
    else:
        ranked = torch.full(chosen.shape, -1.0, dtype=weights.dtype, device=weights.device)
        ranked.scatter_(1, experts, weights.detach())
        best = ranked.topk(min(capacity, len(ranked)), dim=0).indices
        fits = torch.zeros_like(chosen).scatter_(0, best, True)
    return (fits & chosen).gather(1, experts)
