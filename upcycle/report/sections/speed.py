"""Speed and memory, dense beside MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.evaluation.speed_table import speed_rows
from upcycle.report.drawing.bars import Bar, Bars


def speed_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """A table, and bars relative to the parent where there is one."""
    parent, model = data["names"]
    columns, rows, about = speed_rows(data, (parent, model))
    plot = None
    if data["reference"]:
        bars = []
        for title, *_, ratio in rows:
            value = float(ratio.removesuffix("x"))
            bars += [Bar(f"{title}, {parent}", 1.0, "1.00x", 0), Bar(f"{title}, {model}", value, ratio, 1)]
        reading = "Of tokens per second more is better, of memory less."
        plot = Bars("How fast it is, relative to its parent.", reading, bars, "times the parent's")
    return {"columns": columns, "rows": rows, "about": about, "plot": plot}
