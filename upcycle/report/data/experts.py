"""Measures how similar experts' outputs on real inputs are to those of the dense FFN and to each other."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import normalize

from upcycle.models.experts import expert_outputs
from upcycle.progress import SILENT, Progress
from upcycle.report.data.models import Models
from upcycle.report.data.routing import MOST_SHOWN, four_decimals, spread
from upcycle.report.data.run_models import Measurements

_MOST_ELEMENTS = 1 << 25


def experts_data(models: Models, measured: Measurements, progress: Progress = SILENT) -> dict[str, Any]:
    """Compute mean cosines of experts' outputs over a sample of each block's inputs, where every expert reads every token.

    Returns:
        ``tokens`` in a sample; ``layers``, each with ``to_dense`` (a cosine per expert, None without a dense parent) and the
        mean ``to_each_other`` of different experts; ``shown``, with the matrix ``cosine`` of at most four layers.
    """
    shown = set(spread(sorted(measured.inputs), MOST_SHOWN))
    layers, matrices, sample = [], [], 0
    with progress.phase("comparing experts", len(measured.layers)):
        for layer in measured.layers:
            experts = layer.experts
            count = layer.rule.experts
            x = measured.inputs[layer.index]
            x = x[: max(1, _MOST_ELEMENTS // (count * x.shape[1]))]
            sample = len(x)
            outputs = output_directions(experts, x)
            cosine = mean_cosine(outputs)
            others = (cosine.sum() - cosine.trace()).item() / (count * (count - 1)) if count > 1 else 1.0
            dense = _dense_output(models, layer.index, x)
            to_dense = None if dense is None else (outputs * normalize(dense, dim=-1)).sum(-1).mean(1)
            layers.append(
                {
                    "layer": layer.index,
                    "to_dense": None if to_dense is None else four_decimals(to_dense),
                    "to_each_other": others,
                }
            )
            if layer.index in shown:
                matrices.append({"layer": layer.index, "cosine": four_decimals(cosine)})
            progress.advance()
    return {"tokens": sample, "layers": layers, "shown": matrices}


def output_directions(experts: Any, x: torch.Tensor) -> torch.Tensor:
    """Return each routed expert's output on every input ``[S, d]`` as unit vectors ``[E, S, d]``; zero stays zero."""
    with torch.no_grad():
        return torch.stack([normalize(output, dim=-1) for output in expert_outputs(experts, x)])


def mean_cosine(units: torch.Tensor) -> torch.Tensor:
    """Return the cosines of unit vectors ``[E, S, d]``, averaged over S, as ``[E, E]``."""
    flat = units.flatten(1)
    return flat @ flat.T / units.shape[1]


def _dense_output(models: Models, layer: int, x: torch.Tensor) -> torch.Tensor | None:
    if models.reference is None or models.block is None or layer >= len(models.reference.layers):
        return None
    with torch.no_grad():
        output: torch.Tensor = models.reference.layers[layer].get_submodule(models.block)(x[None])[0]
    return output
