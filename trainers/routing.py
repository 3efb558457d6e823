"""Where a stock MoE model keeps its routers, and what each makes of its logits. T tokens, E experts, K top-k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from upcycle.errors import UsageError
from upcycle.registry import load
from upcycle.targets.base import Score, Target
from upcycle.trainers.expert_parallel import is_parallel


@dataclass(frozen=True)
class RoutingRule:
    """What turns logits into choices: scores, a bias that only the choice sees, and how the chosen scores become weights.

    The weights are ``factor * score / (sum of the chosen + epsilon)`` where ``normalized``, else ``factor * score``. A
    softmax of the top-k logits is the same as a normalised top-k of the softmax.
    """

    score: Score
    experts: int
    top_k: int
    normalized: bool = True
    factor: float = 1.0
    epsilon: float = 0.0
    bias: Callable[[], torch.Tensor | None] = lambda: (
        None
    )  # [E]; asked for anew, as casting a model replaces its buffers

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """``[T, E]`` in at least fp32: the softmax, or the sigmoid of every logit."""
        wide = widened(logits)
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
        if self.normalized:
            weights = weights / (weights.sum(-1, keepdim=True) + self.epsilon)
        return self.factor * weights


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer of a stock model: its index, the block with the experts, the router in it, and the router's rule.

    DeepSpeed's AutoEP replaces blocks by its own: ``parallel``. Their experts are divided among ranks.
    """

    index: int
    block: nn.Module
    router: nn.Module
    rule: RoutingRule
    beside: tuple[
        nn.Module, ...
    ] = ()  # blocks whose outputs are added to this one's: shared experts, in some architectures

    @property
    def parallel(self) -> bool:
        """Whether this rank has only some of the experts."""
        return is_parallel(self.block)

    @property
    def experts(self) -> nn.Module:
        """The routed experts, fused as transformers 5 holds them."""
        experts: nn.Module = self.block.get_submodule("experts")
        return experts


def moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Every MoE layer of a stock causal language model, in order.

    Raises:
        UsageError: the architecture is none of the targets, has no MoE layer, or routes by groups.
    """
    target, found = _target(model), []
    for index, layer in enumerate(_decoder_layers(model)):
        block = getattr(layer, target.blocks[0], None)
        if block is not None and hasattr(block, "experts"):
            router = block.router if is_parallel(block) else getattr(block, target.router)
            beside = (getattr(layer, name, None) for name in target.blocks[1:])
            there = tuple(module for module in beside if module is not None)
            found.append(MoeLayer(index, block, router, _rule(target, block, router), there))
    if not found:
        raise UsageError(f"{target.name} model without a single MoE layer", hint="train what upcycle convert wrote")
    return found


def selection_bias(block: nn.Module, router: nn.Module) -> torch.Tensor | None:
    """The tensor that is added to the scores for the choice alone, wherever the architecture keeps it; no gradient reaches it."""
    for holder, name in (
        (router, "e_score_correction_bias"),
        (getattr(router, "moe_statics", None), "e_score_correction_bias"),
        (block, "expert_bias"),
    ):
        bias = getattr(holder, name, None)
        if isinstance(bias, torch.Tensor):
            return bias
    return None


def widened(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp32, or in fp64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def _target(model: Any) -> Target:
    target: Target = load("target", model.config.model_type)()
    return target


def _decoder_layers(model: Any) -> Any:
    return model.model.layers


def _rule(target: Target, block: nn.Module, router: Any) -> RoutingRule:
    if getattr(router, "num_group", 1) != 1:
        raise UsageError(
            f"{target.name} router that chooses experts within {router.num_group} groups (n_group)",
            hint="set n_group and topk_group to 1 in config.json, as upcycle convert writes them",
        )
    weight = next(router.parameters())
    experts = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 keeps the weight itself elsewhere
    if is_parallel(block):
        return RoutingRule(
            router.score_func, experts, router.top_k, router.route_norm, router.route_scale,
            bias=lambda: selection_bias(block, router),
        )  # fmt: skip
    return RoutingRule(
        score=getattr(router, "expert_selection_fn", target.score),
        experts=experts,
        top_k=router.top_k,
        normalized=getattr(router, "norm_topk_prob", True) or getattr(router, "expert_selection_fn", "") == "softmax",
        factor=getattr(router, "routed_scaling_factor", 1.0),
        epsilon=1e-6 if target.name == "lfm2_moe" else 0.0,
        bias=lambda: selection_bias(block, router),
    )
