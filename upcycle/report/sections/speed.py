"""Shows speed and memory, compared with the parent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.evaluation.speed_table import ON_KERNELS, speed_rows
from upcycle.report.drawing.bars import Bar, BarChart


def speed_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table, and bars relative to the parent where there is one."""
    parent, model = data["names"]
    columns, rows, about = speed_rows(data, (parent, model))
    plot = None
    if data["reference"]:
        bars = []
        for title, _, _, ratio, *fast in rows:
            bars += [Bar(f"{title}, {parent}", 1.0, "1.00x", 0), _bar(f"{title}, {model}", ratio)]
            if any(fast):
                bars.append(_bar(f"{title}, {model} {ON_KERNELS}", fast[-1]))
        reading = "More tokens per second are better, and less memory."
        plot = BarChart("How fast is it, relative to its parent?", reading, bars, "ratio to the parent")
    return {"columns": columns, "rows": rows, "about": about, "plot": plot}


def _bar(title: str, ratio: str) -> Bar:
    return Bar(title, float(ratio.removesuffix("x")), ratio, 1)
