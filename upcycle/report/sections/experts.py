"""Shows how similar the experts are to the dense FFN and to each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle.report.drawing.heatmap import heatmap
from upcycle.report.drawing.lines import Series, lines
from upcycle.report.sections.routing import COSINE_SCALE


def experts_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return plots over all layers, and the matrices of some."""
    layers = data["layers"]
    numbers = [layer["layer"] for layer in layers]
    plots = []
    if all(layer["to_dense"] is not None for layer in layers):
        means = [_mean(layer["to_dense"]) for layer in layers]
        plots.append(
            lines(
                [
                    Series("mean", numbers, means),
                    Series(
                        "most alike", numbers, [max(_known(layer["to_dense"]), default=math.nan) for layer in layers]
                    ),
                    Series(
                        "least alike", numbers, [min(_known(layer["to_dense"]), default=math.nan) for layer in layers]
                    ),
                ],
                title="How similar is one expert's output to the dense FFN's?",
                reading=f"Copies have 1; a slice of the FFN has less. Mean over all layers: {_mean(means):.2f}.",
                x="layer",
                y="cosine of the outputs",
                include=(0.0, 1.0),
                whole=True,
            )
        )
    others = [layer["to_each_other"] for layer in layers]
    plots.append(
        lines(
            [Series("different experts", numbers, [math.nan if value is None else value for value in others])],
            title="Do the experts compute different things?",
            reading=f"1: all compute the same (copies before training); 0: nothing in common. Mean: {_mean(others):.2f}.",
            x="layer",
            y="mean cosine of two experts' outputs",
            include=(0.0, 1.0),
            whole=True,
        )
    )
    for part in data["shown"]:
        names = ("expert", [str(i) for i in range(len(part["cosine"]))])
        plots.append(
            heatmap(
                part["cosine"],
                title=f"Layer {part['layer']}: do experts compute different things?",
                reading="Cosine of every two experts' outputs; off the diagonal, orange pairs are redundant.",
                rows=names,
                columns=names,
                scale=COSINE_SCALE,
                unit="cosine",
            )
        )
    return {"plots": plots, "tokens": data["tokens"]}


def _known(values: Sequence[float | None]) -> list[float]:
    """Return the values that are numbers; None stands for those that were not finite."""
    return [value for value in values if value is not None]


def _mean(values: Sequence[float | None]) -> float:
    found = _known(values)
    return sum(found) / len(found) if found else math.nan
