"""What a stock model passes to its decoder layers, asked of the model itself: no architecture's masks are copied here."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch

from upcycle.architectures.module_paths import ModulePaths


def layer_arguments(
    model: Any, paths: ModulePaths, layers: Sequence[torch.nn.Module], wraps: bool = False, **inputs: torch.Tensor
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Run a stock model with layers that do nothing; return what the first reads, and every layer's other arguments.

    Args:
        model: the model; its layers need no weights.
        paths: where its parts are.
        layers: its decoder layers.
        wraps: whether its layers return tuples.
        **inputs: what the model is called with.
    """
    first: list[torch.Tensor] = []
    seen: list[dict[str, Any]] = []
    names = list(signature(type(layers[0]).forward).parameters)[2:]  # behind self and the states

    def nothing(states: torch.Tensor, *positional: Any, **arguments: Any) -> Any:
        first.append(states)
        seen.append({**dict(zip(names, positional, strict=False)), **arguments})
        return (states,) if wraps else states

    norm, body = model.get_submodule(paths.final_norm), paths.body_in(model)
    normal = norm.forward
    for layer in layers:
        layer.forward = nothing
    norm.forward = lambda states: states
    try:
        with torch.no_grad():
            body(**inputs, use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
        norm.forward = normal
    return first[0], seen
