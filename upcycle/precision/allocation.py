"""Decides which experts get how many bits, given a mean.

``mc_moe`` is MC-MoE's integer programme (Huang et al., ICLR 2025, arXiv 2410.06270), ``rules`` the heuristics of the benchmark of Li
et al. (2024, arXiv 2406.08155). U units (an expert, or all experts of a layer), B widths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from upcycle.errors import UsageError

ALPHA, BETA, GAMMA = 1.0, 1.5, 2.0  # MC-MoE's exponents of frequency, weight and error


@dataclass(frozen=True)
class LayerImportance:
    """What calibration text says of the experts of a layer.

    Attributes:
        load: ``[E]``, the share of the choices that fell on each expert.
        weight: ``[E]``, its mean weight where it was chosen, relative to the sum of all experts'.
        error: ``[E, B]``, how much the layer's output changes if it alone is rounded, for every width: a norm, relative to that of
            the stream behind the layer.
        outliers: ``[E]``, the largest of its columns' ``max|w| / mean|w|``.
    """

    load: torch.Tensor
    weight: torch.Tensor
    error: torch.Tensor
    outliers: torch.Tensor


def widths_of(mean: float) -> tuple[int, ...]:
    """Return the widths that a mean is mixed of: those below and above, and one more on either side (2 to 8 are stored)."""
    return tuple(bits for bits in range(math.floor(mean) - 1, math.ceil(mean) + 2) if 2 <= bits <= 8)


def programme(costs: torch.Tensor, sizes: Sequence[int], widths: Sequence[int], mean: float) -> list[int]:
    """Return a width for every unit so that the sum of costs ``[U, B]`` is least and the mean number of bits at most ``mean``.

    Args:
        costs: what each unit costs at each width.
        sizes: the weights in each unit.
        widths: the widths.
        mean: bits per weight.

    Raises:
        UsageError: no width is small enough.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    units, count = costs.shape
    scale = float(costs.abs().max()) or 1.0
    each = np.kron(np.eye(units), np.ones((1, count)))
    share = np.asarray(sizes, dtype=float) / sum(sizes)
    bits = (share[:, None] * np.asarray(widths, dtype=float)[None]).reshape(1, -1)
    found: Any = milp(
        (costs.double() / scale).numpy().reshape(-1),
        constraints=[LinearConstraint(each, 1, 1), LinearConstraint(bits, -np.inf, mean + 1e-9)],
        integrality=np.ones(units * count),
        bounds=Bounds(0, 1),
    )
    if found.x is None:
        raise UsageError(
            f"precision: no mean of {mean:g} bits with {', '.join(map(str, widths))}", hint="--bits mixed:2.5"
        )
    return [widths[int(place)] for place in found.x.reshape(units, count).argmax(1)]


def mc_moe_costs(layers: Sequence[LayerImportance], gamma: float = GAMMA) -> list[torch.Tensor]:
    """Return MC-MoE's costs ``[E, B]`` of every layer: ``load^alpha weight^beta error^gamma``.

    The released solver raises the error to alpha; here it is gamma, as in the paper.
    """
    return [(layer.load.pow(ALPHA) * layer.weight.pow(BETA))[:, None] * layer.error.pow(gamma) for layer in layers]


def by_layer(layers: Sequence[LayerImportance], widths: Sequence[int], mean: float) -> list[list[int]]:
    """Return one width for all experts of a layer: what leaves the least squared change of the layers' outputs, all together.

    An expert's error is measured on the tokens that chose it, at their weights, so that load and weight are in it already.
    """
    costs = torch.stack([layer.error.double().square().sum(0) for layer in layers])
    chosen = programme(costs, [len(layer.load) for layer in layers], widths, mean)
    return [[bits] * len(layer.load) for bits, layer in zip(chosen, layers, strict=True)]


def by_expert(layers: Sequence[LayerImportance], widths: Sequence[int], mean: float) -> list[list[int]]:
    """Return MC-MoE's widths: in every layer the same mean, and its own for every expert."""
    return [programme(costs, [1] * len(costs), widths, mean) for costs in (c.double() for c in mc_moe_costs(layers))]


def by_rules(
    layers: Sequence[LayerImportance], widths: Sequence[int], mean: float, by: str = "frequency"
) -> list[list[int]]:
    """Return the benchmark's widths: more bits for the first layers (``first``), or for the experts of each layer that are chosen
    most often (``frequency``), or whose columns have the largest outliers (``outliers``).
    """
    low, high = max(b for b in widths if b <= mean), min(b for b in widths if b >= mean)
    part = 0.0 if high == low else (mean - low) / (high - low)
    if by == "first":
        count = math.floor(part * len(layers) + 1e-9)
        return [[high if index < count else low] * len(layer.load) for index, layer in enumerate(layers)]
    made = []
    for layer in layers:
        scores = layer.load if by == "frequency" else layer.outliers
        best = scores.argsort(descending=True, stable=True)[: math.floor(part * len(scores) + 1e-9)].tolist()
        made.append([high if expert in best else low for expert in range(len(scores))])
    return made


def evenly(layers: int, experts: int, mean: float) -> list[list[int]]:
    """Return widths that look at nothing: the two around the mean, alternating from layer to layer."""
    low, high = math.floor(mean), math.ceil(mean)
    part = mean - low
    steps = [math.floor(part * (index + 1) + 1e-9) - math.floor(part * index + 1e-9) for index in range(layers)]
    return [[high if step else low] * experts for step in steps]
