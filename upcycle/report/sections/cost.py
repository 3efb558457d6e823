"""Shows what the model costs, compared with its parent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from upcycle.formatting import count, size
from upcycle.report.drawing.bars import Bar, BarChart

_NAMES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("parameters", "parameters", count),
    ("active_parameters", "active parameters", count),
    ("flops_per_token", "FLOPs per token", count),
    ("bytes", "weight files", size),
)


def cost_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table, and bars relative to the parent where there is one."""
    before, after = data["before"], data["after"]
    parent, model = data["names"]
    rows, bars = [], []
    for key, name, text in _NAMES:
        first, second = before[key] if before else None, after[key]
        ratio = second / first if first else None
        rows.append((name, text(first) if first else "-", text(second), f"{ratio:.2f}x" if ratio else "-"))
        if ratio:
            bars += [Bar(f"{name}, {parent}", 1.0, "1.00x", 0), Bar(f"{name}, {model}", ratio, f"{ratio:.2f}x", 1)]
    plot = None
    if bars:
        reading = "; ".join(f"{name} {ratio}" for name, _, _, ratio in rows if ratio != "-")
        plot = BarChart("What does it cost, relative to its parent?", f"{reading}.", bars, "ratio to the parent")
    return {"columns": ["", parent, model, "ratio"], "rows": rows, "plot": plot}
