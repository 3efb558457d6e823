"""Draws heatmaps on one colour scale, as small images that are stretched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from upcycle.report.drawing.frame import Axis, Plot, cell_ticks
from upcycle.report.drawing.png import STOPS, png_uri

MOST_CELLS = 4096  # whose numbers are written out; of more, so many steps of the scale are told apart
CELL_CODES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"  # the last: no number

Grid = Sequence[Sequence[float | None]]


def heatmap(
    matrix: Grid,
    *,
    title: str,
    reading: str,
    rows: tuple[str, Sequence[str]],
    columns: tuple[str, Sequence[str]],
    scale: tuple[float, float],
    unit: str,
    ends: tuple[str, str] | None = None,
    wide: bool = False,
) -> Plot:
    """Return a heatmap of a matrix, with its first row on top.

    Args:
        matrix: numbers, or None for cells without one.
        title: what to look for.
        reading: what this heatmap shows.
        rows: label of the vertical axis, and the rows' names.
        columns: label of the horizontal axis, and the columns' names.
        scale: the numbers that the first and the last colour stand for; fixed, so that reports can be compared.
        unit: what the colours mean.
        ends: labels for the ends of the scale; default: their numbers.
        wide: take a whole row of the page instead of a square.
    """
    low, high = scale
    image = Markup('<img alt="" src="{}">').format(png_uri(matrix, low, high))
    first, last = ends or (f"{low:g}", f"{high:g}")
    empty = any(value is None for row in matrix for value in row) or len({len(row) for row in matrix}) > 1
    gradient = ", ".join(f"rgb{stop}" for stop in STOPS)
    legend = Markup(
        '<div class="scale"><span>{}</span><i style="background:linear-gradient(90deg, {})"></i><span>{}</span>'
        '<span class="unit">{} (middle: {:g}{})</span></div>'
    ).format(first, gradient, last, unit, (low + high) / 2, ", grey: none" if empty else "")
    height = f"{min(420, max(64, 15 * len(matrix)))}px" if wide else "auto"
    return Plot(
        title=title,
        reading=reading,
        area=image,
        x=Axis(columns[0], cell_ticks(columns[1], 12 if wide else 8)),
        y=Axis(rows[0], cell_ticks(rows[1], max(2, min(420, 15 * len(matrix)) // 15) if wide else 8, downwards=True)),
        height=height,
        wide=wide,
        legend=legend,
        square=not wide,
        values={
            "kind": "grid",
            "rows": rows[0],
            "columns": columns[0],
            "names": [list(rows[1]), list(columns[1])],
            "unit": unit,
            **_cells(matrix, low, high),
        },
    )


def _cells(matrix: Grid, low: float, high: float) -> dict[str, Any]:
    """Return a matrix for the page's script: numbers or, to keep the page light, a character per cell for its place on the scale."""
    if sum(map(len, matrix)) <= MOST_CELLS:
        return {"cells": [list(row) for row in matrix]}
    steps = len(CELL_CODES) - 2
    return {
        "scale": [low, high],
        "codes": ["".join(CELL_CODES[_step(value, low, high, steps)] for value in row) for row in matrix],
    }


def _step(value: float | None, low: float, high: float, steps: int) -> int:
    """Return the place of a number on a scale of steps; one more than these for none."""
    if value is None or not math.isfinite(value):
        return steps + 1
    return round(min(1.0, max(0.0, (value - low) / (high - low))) * steps)
