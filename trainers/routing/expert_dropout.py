"""Expert dropout: in training, neurons inside routed experts are dropped, more of them than anywhere else in the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from upcycle.errors import UsageError
from upcycle.models.own.factored_experts import FactoredExperts
from upcycle.models.own.moe_block import PackedExperts


class DroppedActivation(nn.Module):
    """An activation function of experts, some of whose outputs are 0 in training, and the others as much larger.

    In an expert with a gate they are factors of what ``up`` gives, so that dropping them drops the neurons.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], rate: float) -> None:
        super().__init__()
        self.function, self.rate = function, rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activations of ``x``, of the same shape."""
        return functional.dropout(self.function(x), self.rate, self.training)


def drop_inside(experts: nn.Module, rate: float) -> Callable[[], None]:
    """Drop neurons of routed experts from now on, in training alone; returns what ends it.

    As in fine-tuning of Switch (arXiv 2101.03961, section 2.4) and ST-MoE (arXiv 2202.08906), and in Flan-MoE
    (arXiv 2305.14705). While it acts, experts run on their class's own code or a grouped product of transformers: upcycle's
    kernels have no dropout. Masks are drawn from torch's generator, which every step seeds for each rank.

    Args:
        experts: a module of routed experts, of a stock class or of upcycle's own.
        rate: the share of neurons, of every token and expert anew.

    Raises:
        UsageError: they have a gating of their own, in which no activation can be dropped.
    """
    own = isinstance(experts, PackedExperts | FactoredExperts)
    name = "act" if own else "act_fn"
    function = getattr(experts, name, None)
    if function is None or (not own and _own_gating(experts)):
        raise UsageError(
            f"control.expert_dropout: {type(experts).__name__} has a gating of its own, in which no activation can be dropped",
            hint="leave it out, or convert to another target",
        )
    if isinstance(function, nn.Module) and function.state_dict():
        raise UsageError(
            f"control.expert_dropout: the activation {type(function).__name__} has weights of its own, which would change their names",
            hint="leave it out",
        )
    dropped = DroppedActivation(function, rate)
    dropped.train(experts.training)
    kernels = experts.implementation if isinstance(experts, PackedExperts) else None
    _put(experts, name, dropped)
    if isinstance(experts, PackedExperts):
        experts.implementation = "eager"

    def end() -> None:
        _put(experts, name, function)
        if isinstance(experts, PackedExperts) and kernels is not None:
            experts.implementation = kernels

    return end


def _put(experts: nn.Module, name: str, function: Any) -> None:
    """Give experts an activation, which may be a module or, in some classes, a plain function."""
    experts._modules.pop(name, None)
    experts.__dict__.pop(name, None)
    setattr(experts, name, function)


def _own_gating(experts: nn.Module) -> bool:
    from transformers.integrations.moe import _default_apply_gate

    gating = getattr(type(experts), "_apply_gate", _default_apply_gate)
    return bool(getattr(experts, "has_gate", True)) and gating is not _default_apply_gate
