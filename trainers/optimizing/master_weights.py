"""fp32 weights beside those that a model computes with in 16 bits, for an optimizer that no other rank shares.

ZeRO keeps such weights, too, in flat tensors that ranks divide among them. On a single rank nothing is divided, and copying every
gradient into the flat tensors and back took up to half of a step of 512 tokens on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

_MASTER = "upcycle_master"  # attribute of a weight: the fp32 weight that the optimizer steps on


def with_masters(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups whose 16-bit weights are replaced by fp32 ones, which their gradients reach.

    While the backward pass goes on, each gradient is added to its fp32 weight's in fp32, and freed. The optimizer that steps on the
    groups must be given to :func:`follow_masters`.

    Args:
        groups: of an optimizer; ``params`` is a list of weights of any dtype.
    """
    return [{**group, "params": [_mastered(weight) for weight in group["params"]]} for group in groups]


def _mastered(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    if weight.dtype == torch.float32:
        return weight
    master = torch.nn.Parameter(weight.detach().float())
    setattr(weight, _MASTER, master)
    weight.register_post_accumulate_grad_hook(_hand_over)
    return master


def _hand_over(weight: torch.Tensor) -> None:
    """Add a weight's gradient, which is complete, to its fp32 weight's."""
    master = stepped_on(weight)
    assert weight.grad is not None
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad.add_(weight.grad)
    weight.grad = None


def stepped_on(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight that the optimizer steps on: the fp32 one of a 16-bit weight, or the weight itself."""
    master: torch.Tensor = getattr(weight, _MASTER, weight)
    return master


def follow_masters(optimizer: torch.optim.Optimizer, weights: Iterable[torch.Tensor]) -> None:
    """Let 16-bit weights follow their fp32 ones, rounded, after every step of an optimizer; gradients are freed then."""
    pairs = [(weight, stepped_on(weight)) for weight in weights if stepped_on(weight) is not weight]

    @torch.no_grad()
    def follow(*_: Any) -> None:
        for weight, master in pairs:
            if master.grad is not None:
                weight.copy_(master)
                master.grad = None

    optimizer.register_step_post_hook(follow)
