"""Measures on text what rounding each expert to each width would change, and decides how many bits each gets.

E experts, B widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from upcycle.calibration.compressing.made_parts import held_out_tokens
from upcycle.calibration.compressing.moe_walk import MoeWalk, Routed
from upcycle.calibration.compressing.round_layers import RoutedTexts, rounded_expert
from upcycle.models.stock_layers import Layers
from upcycle.precision.allocation import (
    LayerImportance,
    by_expert,
    by_layer,
    by_rules,
    evenly,
    widths_of,
)
from upcycle.progress import Progress
from upcycle.recipe.precision_recipe import PrecisionRecipe

if TYPE_CHECKING:
    from upcycle.planning.precision.scheme import Matrix


def allocated(
    recipe: PrecisionRecipe,
    layers: Layers,
    matrices: Mapping[int, Sequence[Matrix]],
    windows: torch.Tensor | None,
    progress: Progress,
) -> dict[int, tuple[int, ...]]:
    """Decide the bits of every expert of every layer, for ``mixed:`` precision.

    Args:
        recipe: the mean, and how it is allocated.
        layers: the model before it is rounded.
        matrices: those that will be rounded, by layer, on any grid.
        windows: the text, token ids ``[N, W]``; None where the allocation looks at none.
        progress: where to report.
    """
    mean = recipe.mean
    assert mean is not None
    experts = {layer: [m for m in own if m.part] for layer, own in matrices.items()}
    places = [layer for layer, own in experts.items() if own]
    count = max(matrix.expert for matrix in experts[places[0]]) + 1
    if recipe.allocation == "even":
        chosen = evenly(len(places), count, mean)
    else:
        widths = widths_of(mean)
        if recipe.allocation == "first":
            nothing = torch.zeros(count)
            seen = [LayerImportance(nothing, nothing, nothing[:, None], nothing)] * len(places)
        else:
            assert windows is not None
            seen = _importance(layers, experts, widths, windows, progress)
        match recipe.allocation:
            case "layers":
                chosen = by_layer(seen, widths, mean)
            case "mc_moe":
                chosen = by_expert(seen, widths, mean)
            case rule:
                chosen = by_rules(seen, widths, mean, rule)
    return {layer: tuple(own) for layer, own in zip(places, chosen, strict=True)}


def _importance(
    layers: Layers,
    matrices: Mapping[int, Sequence[Matrix]],
    widths: Sequence[int],
    windows: torch.Tensor,
    progress: Progress,
) -> list[LayerImportance]:
    walk = MoeWalk(layers, windows.shape[1])
    found = []
    with progress.phase("trying widths", len(walk.layers)):
        stream = torch.cat([walk.embed(windows[batch]) for batch in walk.batches(len(windows))])
        held = held_out_tokens(stream)
        for index in range(len(walk.layers)):
            with walk.loaded(index):
                seen: list[Routed] = []
                for batch in walk.batches(len(windows)):
                    stream[batch] = walk.run(index, stream[batch], seen.append)
                if matrices.get(index):
                    size = stream.double().square().sum().item() ** 0.5
                    module: Any = walk.places[index].experts
                    found.append(_of_layer(module, matrices[index], widths, RoutedTexts(seen, held), size))
            progress.advance()
    return found


def _of_layer(
    experts: Any, matrices: Sequence[Matrix], widths: Sequence[int], chosen: RoutedTexts, size: float
) -> LayerImportance:
    """Measure one layer; ``size`` is the norm of the stream behind it."""
    count, width = len(experts.gate_up_proj), experts.gate_up_proj.shape[1] // 2
    load, weight = torch.zeros(count).double(), torch.zeros(count).double()
    error, outliers = torch.zeros(count, len(widths)).double(), torch.zeros(count).double()
    grids: dict[int, dict[str, Any]] = {}
    for matrix in matrices:
        grids.setdefault(matrix.expert, {})[matrix.part] = matrix.grid
    for expert in range(count):
        gate_up = experts.gate_up_proj[expert].detach()
        whole = {"gate": gate_up[:width], "up": gate_up[width:], "down": experts.down_proj[expert].detach()}
        x, _, own = inputs = chosen.of(expert)
        load[expert], weight[expert] = len(x), own.double().mean() if len(x) else 0.0
        outliers[expert] = max(
            float((w.abs().amax(0) / w.abs().mean(0).clamp(min=1e-30)).max()) for w in whole.values()
        )
        if not len(x):
            continue
        before = _output(experts, x, whole)
        for place, bits in enumerate(widths):
            wanted = {part: replace(grid, bits=bits) for part, grid in grids[expert].items()}
            made = rounded_expert(whole, experts.act_fn, wanted, inputs)
            after = _output(experts, x, {part: rounded.means for part, (rounded, _) in made.items()})
            change = ((after - before) * own[:, None]).double().square().sum().item()
            error[expert, place] = change**0.5 / size
    return LayerImportance(load / load.sum(), weight / weight.sum(), error, outliers)


def _output(experts: Any, x: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    active = experts.act_fn(linear(x, weights["gate"])) * linear(x, weights["up"])
    return linear(active, weights["down"])
