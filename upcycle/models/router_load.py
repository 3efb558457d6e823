"""How evenly the experts of a stock MoE are used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from upcycle.architectures.module_paths import find_module_paths


@dataclass(frozen=True)
class LayerLoad:
    """How one MoE layer spread the (token, expert) pairs: ``load`` sums to 1, ``entropy`` is relative to uniform."""

    layer: int
    load: list[float]
    max_over_mean: float
    entropy: float
    dead_experts: list[int]


@contextmanager
def load_counts(model: Any) -> Iterator[dict[int, torch.Tensor]]:
    """Count what every router chooses: layer -> int64 ``[E]``. A stock router returns (logits, weights, indices)."""
    counts: dict[int, torch.Tensor] = {}
    hooks = []
    for index, layer in enumerate(find_module_paths(model.config.model_type).layers_in(model)):
        named = (module for name, module in layer.named_modules() if name.endswith((".gate", ".router")))
        router = next((module for module in named if hasattr(module, "top_k")), None)
        if router is None:
            continue
        counts[index] = torch.zeros(router.num_experts, dtype=torch.int64)

        def count(_: Any, __: Any, output: Any, index: int = index) -> None:
            counts[index] += torch.bincount(output[2].flatten(), minlength=len(counts[index]))

        hooks.append(router.register_forward_hook(count))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def layer_load(layer: int, counts: torch.Tensor) -> LayerLoad:
    """What ``counts`` ``[E]`` of one layer say."""
    load = counts.double() / counts.sum()
    entropy = -torch.xlogy(load, load).sum().item()
    return LayerLoad(
        layer=layer,
        load=load.tolist(),
        max_over_mean=(load.max() * len(load)).item(),
        entropy=entropy / math.log(len(load)) if len(load) > 1 else 1.0,
        dead_experts=torch.nonzero(counts == 0).flatten().tolist(),
    )
