"""Shows speed and memory, compared with the parent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.evaluation.speed_table import speed_rows
from upcycle.report.drawing.bars import Bar, BarChart


def speed_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table, and bars relative to the parent where there is one."""
    parent, model = data["names"]
    columns, rows, about = speed_rows(data, (parent, model))
    plot = None
    if data["reference"]:
        bars = []
        for title, *_, ratio in rows:
            value = float(ratio.removesuffix("x"))
            bars += [Bar(f"{title}, {parent}", 1.0, "1.00x", 0), Bar(f"{title}, {model}", value, ratio, 1)]
        reading = "More tokens per second are better, and less memory."
        plot = BarChart("How fast is it, relative to its parent?", reading, bars, "ratio to the parent")
    return {"columns": columns, "rows": rows, "about": about, "plot": plot}
