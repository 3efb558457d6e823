"""The activations of experts and their derivatives, by name, written into the caller's buffers."""

from __future__ import annotations

from collections.abc import Callable

import torch

aten = torch.ops.aten


def activate(name: str, z: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write ``act(z)`` to ``out``, which may be ``z``, and return it; both are floating, of one shape, with any strides."""
    return _FORWARD[name](z, out)


def activation_gradient(name: str, grad: torch.Tensor, z: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write ``grad * act'(z)`` to ``out``, which may be ``grad``, and return it; 0 where an activation has a corner, as in torch."""
    return _BACKWARD[name](grad, z, out)


def _relu2(z: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.clamp(z, min=0, out=out).square_()


def _relu2_gradient(grad: torch.Tensor, z: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.mul(grad, z.clamp(min=0).mul_(2), out=out)


_FORWARD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": lambda z, out: aten.silu.out(z, out=out),
    "gelu": lambda z, out: aten.gelu.out(z, out=out),
    "gelu_pytorch_tanh": lambda z, out: aten.gelu.out(z, approximate="tanh", out=out),
    "relu": lambda z, out: torch.clamp(z, min=0, out=out),
    "relu2": _relu2,
}
_BACKWARD: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "silu": lambda grad, z, out: aten.silu_backward.grad_input(grad, z, grad_input=out),
    "gelu": lambda grad, z, out: aten.gelu_backward.grad_input(grad, z, grad_input=out),
    "gelu_pytorch_tanh": lambda grad, z, out: aten.gelu_backward.grad_input(
        grad, z, approximate="tanh", grad_input=out
    ),
    "relu": lambda grad, z, out: aten.threshold_backward.grad_input(grad, z, 0, grad_input=out),
    "relu2": _relu2_gradient,
}
