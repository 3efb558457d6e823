"""Lets MoE blocks train under ZeRO-3 where nothing before them does."""

from __future__ import annotations

from typing import Any

import torch

from upcycle.trainers.routing.stock_routers import MoeLayer


def give_inputs_gradients(layers: list[MoeLayer]) -> None:
    """Have the inputs of blocks that train take gradients.

    ZeRO-3 fetches a MoE block's weights as a whole, and frees them when the gradient of the block's input is known. Where
    that input takes none, because only routers or experts train and this is the first block, DeepSpeed 0.19 frees them before
    the block's own gradients are made ("The size of tensor a (0) must match"). The gradient of the input is thrown away: it
    costs one product per matrix of this block.

    Call it before the engine is made, whose hooks then come behind.
    """
    for layer in layers:
        if any(parameter.requires_grad for parameter in layer.block.parameters()):
            layer.block.register_forward_pre_hook(_with_gradients, with_kwargs=True)


def _with_gradients(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not torch.is_grad_enabled():
        return inputs, named
    return tuple(map(_asking, inputs)), {name: _asking(value) for name, value in named.items()}


def _asking(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_()
    return value
