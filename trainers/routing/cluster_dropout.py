"""MoEC's dropout of experts within clusters: in training, tokens choose among some experts of each. E experts."""

from __future__ import annotations

import torch

from upcycle.errors import UsageError
from upcycle.trainers.data.keyed_random import permutation
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.stock_routers import MoeLayer


def check_clusters(options: ControlParameters, layer: MoeLayer) -> None:
    """Refuse clusters that a router's experts do not form, or of which too few are left.

    Raises:
        UsageError: see above, or the router has a bias on the choice, which could choose what is dropped.
    """
    rule = layer.rule
    if rule.experts % options.clusters:
        raise UsageError(
            f"control.clusters: {options.clusters} does not divide {rule.experts} experts",
            hint="clusters have one size",
        )
    left = options.clusters * survivors(rule.experts // options.clusters, options.cluster_dropout)
    if left < rule.top_k:
        raise UsageError(
            f"control.cluster_dropout: {options.cluster_dropout:g} leaves {left} of {rule.experts} experts, and each token needs "
            f"{rule.top_k}",
            hint="a smaller cluster_dropout",
        )
    if rule.bias() is not None or rule.constant is not None:
        raise UsageError(
            "control.cluster_dropout: these routers choose by a bias, or weigh experts by no score: what is dropped could be chosen",
            hint="leave it out",
        )


def survivors(size: int, rate: float) -> int:
    """How many experts of a cluster are left: at least one."""
    return max(1, size - int(rate * size + 0.5))


def dropped_experts(experts: int, options: ControlParameters, layer: int, step: int) -> torch.Tensor:
    """Bool ``[E]``: which of a layer's experts no token may choose in a step; a function of layer and step alone."""
    size, period = experts // options.clusters, step // options.cluster_steps
    gone = torch.zeros(experts, dtype=torch.bool)
    for cluster in range(options.clusters):
        order = permutation(size, "cluster dropout", period, layer, cluster)
        gone[cluster * size + torch.from_numpy(order[survivors(size, options.cluster_dropout) :])] = True
    return gone


def without_dropped(logits: torch.Tensor, options: ControlParameters, layer: int, step: int) -> torch.Tensor:
    """Logits ``[T, E]``, minus infinity for the experts that are dropped in a step."""
    gone = dropped_experts(logits.shape[1], options, layer, step)
    return logits.masked_fill(gone.to(logits.device), -torch.inf)
