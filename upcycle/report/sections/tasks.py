"""Shows scores on tasks, compared with the parent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.evaluation.score_table import score_rows
from upcycle.report.drawing.bars import Bar, BarChart


def tasks_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table of all scores, and bars of those that are shares of right answers."""
    columns, rows = score_rows(data, tuple(data["names"]))
    parent, model = data["names"]
    bars: list[Bar] = []
    lost, compared = 0, 0
    for score in data["scores"]:
        if score["higher_is_better"] is not True or not 0 <= score["value"] <= 1:
            continue
        title = f"{score['task']}, {score['metric']}"
        if score["reference"] is not None:
            compared += 1
            lost += score["value"] < score["reference"]
            bars.append(Bar(f"{title}, {parent}", score["reference"], f"{score['reference']:.3f}", 0))
        bars.append(Bar(f"{title}, {model}", score["value"], f"{score['value']:.3f}", 1))
    plot = None
    if bars:
        reading = "Higher is better."
        if compared:
            reading += (
                f" {lost} of {compared} are below the parent's; compare this with the standard errors in the table."
            )
        plot = BarChart("How well does it do on tasks?", reading, bars, "score")
    return {"columns": columns, "rows": rows, "plot": plot, "harness": data["harness"], "limit": data["limit"]}
