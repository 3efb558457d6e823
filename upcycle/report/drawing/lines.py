"""Draws line plots of one or several series, with a linear or logarithmic vertical axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from upcycle.report.drawing.frame import Axis, Plot, names_legend, nice_ticks, number

_SIZE = 1000  # width and height of the drawing in its own units; the page stretches it to the frame


@dataclass(frozen=True)
class Series:
    """The points of one line."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]

    def points(self, logarithmic: bool) -> list[tuple[float, float]]:
        """Return the points that can be drawn: not None, finite and, on a logarithmic axis, positive."""
        found = []
        for x, y in zip(self.x, self.y, strict=True):
            if y is not None and math.isfinite(y) and (y > 0 or not logarithmic):
                found.append((x, math.log10(y) if logarithmic else y))
        return found


def lines(
    series: Sequence[Series],
    *,
    title: str,
    reading: str,
    x: str,
    y: str,
    logarithmic: bool = False,
    include: Sequence[float] = (),
    whole: bool = False,
    wide: bool = False,
) -> Plot:
    """Return a plot of the series; lines of few points have a dot at each, and series of one point are larger dots.

    Args:
        series: at most six, which colours and dashes can tell apart.
        title: what to look for.
        reading: what this plot shows.
        x: label of the horizontal axis, with its unit.
        y: label of the vertical axis, with its unit.
        logarithmic: make the vertical axis logarithmic.
        include: numbers that the vertical axis must include.
        whole: put only integers on the horizontal axis.
        wide: take a whole row of the page.
    """
    drawn = [line.points(logarithmic) for line in series]
    every = [point for points in drawn for point in points] or [(0.0, 0.0)]
    ys = [value for _, value in every] + [math.log10(v) if logarithmic else v for v in include]
    x_low, x_high = min(p for p, _ in every), max(p for p, _ in every)
    lone = all(len(points) <= 1 for points in drawn)  # a dot for each series, and none of them on the frame
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    elif lone:
        x_low, x_high = x_low - 0.06 * (x_high - x_low), x_high + 0.06 * (x_high - x_low)
    y_ticks = _decades(min(ys), max(ys)) if logarithmic else nice_ticks(min(ys), max(ys))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(value: float, low: float, high: float) -> float:
        return (value - low) / (high - low)

    def spot(point: tuple[float, float]) -> str:
        across, up = place(point[0], x_low, x_high), place(point[1], y_low, y_high)
        return f"{_SIZE * across:.1f} {_SIZE * (1 - up):.1f}"

    grid = "".join(f"M0 {_SIZE * (1 - place(t, y_low, y_high)):.1f}H{_SIZE}" for t in y_ticks)
    paths = [Markup('<path class="grid" d="{}"/>').format(grid)]
    for i, points in enumerate(drawn):
        if not points:
            continue
        paths.append(Markup('<path class="line s{}" d="M{}"/>').format(i, "L".join(map(spot, points))))
        if len(points) <= 48:
            dots = "".join(f"M{spot(point)}h0" for point in points)
            paths.append(Markup('<path class="dots{} s{}" d="{}"/>').format(" lone" if lone else "", i, dots))
    area = Markup('<svg viewBox="0 0 {0} {0}" preserveAspectRatio="none" aria-hidden="true">{1}</svg>').format(
        _SIZE, Markup("").join(paths)
    )
    x_ticks = [t for t in nice_ticks(x_low, x_high, 6) if x_low <= t <= x_high and (not whole or t == int(t))]
    label = (lambda t: f"1e{t:.0f}") if logarithmic else number
    return Plot(
        title=title,
        reading=reading,
        area=area,
        x=Axis(x, [(place(t, x_low, x_high), number(t)) for t in x_ticks]),
        y=Axis(y, [(place(t, y_low, y_high), label(t)) for t in y_ticks]),
        wide=wide,
        legend=names_legend(
            [line.name if points or not lone else "" for line, points in zip(series, drawn, strict=True)], dots=lone
        ),
        values={
            "kind": "lines",
            "x": x,
            "y": y,
            "range": [x_low, x_high],
            "series": [_values(line) for line in series if line.x or not lone],
        },
    )


def _values(line: Series) -> dict[str, Any]:
    """Return a line's points for the page's script, without those that have no number."""
    known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and math.isfinite(y)]
    return {"name": line.name, "x": [x for x, _ in known], "y": [y for _, y in known]}


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(low), math.ceil(high)
    last = last if last > first else first + 1
    step = max(1, math.ceil((last - first) / 5))
    return [float(t) for t in range(first, last + step, step)]
