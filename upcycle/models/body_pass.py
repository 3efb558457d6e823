"""What a stock model passes to its decoder layers, asked of the model itself: no architecture's masks are copied here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch

from upcycle.architectures.module_paths import ModulePaths


def layer_arguments(
    model: Any,
    paths: ModulePaths,
    layers: Sequence[torch.nn.Module],
    given: Mapping[str, Any],
    wraps: bool = False,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Run a stock model with layers that do nothing; return what the first reads, and every layer's other arguments.

    Args:
        model: the model; its layers need no weights.
        paths: where its parts are.
        layers: its decoder layers.
        given: what the model is called with.
        wraps: whether its layers return tuples.
    """
    first: list[torch.Tensor] = []
    seen: list[dict[str, Any]] = []
    names = list(signature(type(layers[0]).forward).parameters)[2:]  # behind self and the states

    def nothing(states: torch.Tensor, *positional: Any, **arguments: Any) -> Any:
        first.append(states)
        seen.append({**dict(zip(names, positional, strict=False)), **arguments})
        return (states,) if wraps else states

    body = paths.body_in(model)
    skipped = [model.get_submodule(paths.final_norm)] if paths.final_norm else []
    normal = [norm.forward for norm in skipped]
    for layer in layers:
        layer.forward = nothing
    for norm in skipped:
        norm.forward = lambda states: states
    try:
        with torch.no_grad():
            body(**given)
    finally:
        for layer in layers:
            del layer.forward
        for norm, own in zip(skipped, normal, strict=True):
            norm.forward = own
    return first[0], seen
