"""A workaround for MoE blocks that train under ZeRO-3 when no weight before them does."""

from __future__ import annotations

from typing import Any

import torch

from upcycle.trainers.routing.stock_routers import MoeLayer


def give_inputs_gradients(layers: list[MoeLayer]) -> None:
    """Make the inputs of blocks that train require gradients.

    ZeRO-3 fetches a MoE block's weights as a whole, and frees them when the gradient of the block's input is known. If only
    routers or experts train, the first block's input has no gradient, and DeepSpeed 0.19 frees the weights before the block's
    own gradients are computed ("The size of tensor a (0) must match"). The input's gradient is not used: it costs one product
    per matrix of this block.

    Call it before the engine is made, so that the engine's hooks run after these.

    Args:
        layers: the model's MoE layers.
    """
    for layer in layers:
        if any(parameter.requires_grad for parameter in layer.block.parameters()):
            layer.block.register_forward_pre_hook(_require_gradients, with_kwargs=True)


def _require_gradients(
    _: Any, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not torch.is_grad_enabled():
        return inputs, named
    return tuple(map(_with_gradient, inputs)), {name: _with_gradient(value) for name, value in named.items()}


def _with_gradient(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_()
    return value
