"""Runs a stock model with random weights once, and keeps what its modules read and put out. T tokens, rows are tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_SPREAD = 1.5  # of projections' outputs: where activations differ most


@dataclass
class Call:
    """The first call of a module: ``x`` and ``y`` ``[T, n]``, and how often the module ran."""

    module: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    times: int = 1


def recorded_calls(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Call]:
    """Return the calls of all modules below the base model that map one tensor to one tensor, by path.

    Args:
        model: a stock model on the CPU, whose weights are replaced by random ones.
        inputs: what it reads.
    """
    _randomize(model)
    calls: dict[str, Call] = {}

    def keep(path: str, module: nn.Module, x: Any, y: Any) -> None:
        if path in calls:
            calls[path].times += 1
        elif isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.ndim and y.ndim:
            calls[path] = Call(module, _rows(x), _rows(y))

    hooks = [
        module.register_forward_hook(
            lambda own, args, kwargs, y, path=path: keep(path, own, next(iter((*args, *kwargs.values())), None), y),
            with_kwargs=True,
        )
        for path, module in model.base_model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the relative difference of two tensors; infinite where their shapes are others."""
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).norm() / other.norm().clamp_min(1e-30))


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().reshape(-1, tensor.shape[-1]).clone()  # an activation may work in place


def _randomize(model: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=rng)
            if weight.ndim > 1:
                weight.copy_(drawn * _SPREAD / weight[0].numel() ** 0.5)
            else:
                weight.add_(0.1 * drawn)
