"""How evenly the experts of a stock MoE are used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from upcycle.trainers.routing.recorder import Recorder
from upcycle.trainers.routing.router_records import watch_router
from upcycle.trainers.routing.stock_routers import find_routers


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
    """Count what every router chooses while ``model(...)`` runs within this context: layer -> int64 ``[E]``."""
    counts: dict[int, torch.Tensor] = {}
    with Recorder[None](model) as recorder:
        for place in find_routers(model):
            counts[place.index] = torch.zeros(place.count, dtype=torch.int64)

            def count(_: Any, __: Any, experts: torch.Tensor, index: int = place.index) -> None:
                chosen = torch.bincount(experts.flatten(), minlength=len(counts[index]))
                counts[index] += chosen[: len(counts[index])].cpu()  # what follows is of places without an expert

            watch_router(recorder, place.block, place.router, count)
        yield counts


def layer_load(layer: int, counts: torch.Tensor) -> LayerLoad:
    """The load of one layer whose experts were chosen ``counts`` ``[E]`` times."""
    load = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.xlogy(load, load).sum().item()
    return LayerLoad(
        layer=layer,
        load=load.tolist(),
        max_over_mean=(load.max() * len(load)).item(),
        entropy=entropy / math.log(len(load)) if len(load) > 1 else 1.0,
        dead_experts=torch.nonzero(counts == 0).flatten().tolist(),
    )
