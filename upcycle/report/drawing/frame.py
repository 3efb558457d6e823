"""Draws a plot's frame: a title that says what to look for, axes with labels, and a description in words.

Everything except the marks is HTML, so that text keeps its size on narrow and wide screens and takes the page's colours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

_NOTHING = Markup()


@dataclass(frozen=True)
class Axis:
    """An axis; each tick is a place from 0 (left or bottom) to 1, and its text."""

    label: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Plot:
    """A plot in its frame.

    Attributes:
        title: what to look for.
        reading: what the marks show, below the title and in the text alternative.
        area: the marks.
        x: the horizontal axis.
        y: the vertical axis.
        height: the area's height in CSS.
        wide: whether the plot takes a whole row of the page.
        legend: below the plot.
        square: whether the area is a square.
        values: what the marks show, for the page's script (:func:`values_block`).
    """

    title: str
    reading: str
    area: Markup
    x: Axis
    y: Axis
    height: str = "200px"
    wide: bool = False
    legend: Markup = _NOTHING
    square: bool = False
    values: Mapping[str, Any] | None = None

    def __html__(self) -> str:
        return str(
            Markup(
                '<figure class="plot{kind}"><figcaption><strong>{title}</strong> {reading}</figcaption>'
                '<div class="frame" role="img" aria-label="{alt}">'
                '<div class="ylabel" title="{ylabel}">{ylabel}</div><div class="yticks">{yticks}</div>'
                '<div class="area" style="height:{height}">{area}</div>'
                '<div class="xticks">{xticks}</div><div class="xlabel">{xlabel}</div></div>{legend}{values}</figure>'
            ).format(
                kind=(" wide" if self.wide else "") + (" square" if self.square else ""),
                title=self.title,
                reading=self.reading,
                alt=f"{self.title} {self.reading} Horizontal axis: {self.x.label}. Vertical axis: {self.y.label}.",
                ylabel=self.y.label,
                yticks=_ticks(self.y, "bottom"),
                xticks=_ticks(self.x, "left"),
                xlabel=self.x.label,
                height=self.height,
                area=self.area,
                legend=self.legend,
                values=values_block(self.values),
            )
        )


def values_block(values: Mapping[str, Any] | None) -> Markup:
    """Return a figure's values as a block of data, which no browser runs; nothing in it can end it."""
    if values is None:
        return _NOTHING
    text = json.dumps(four_digits(values), separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # which a parser of HTML would heed
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup('<script type="application/json" class="values">{}</script>').format(Markup(text))


def four_digits(value: Any) -> Any:
    """Return plain data with four significant digits, which are more than a plot shows; None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: four_digits(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [four_digits(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def _ticks(axis: Axis, side: str) -> Markup:
    template = Markup('<span style="{}:{:.2f}%">{}</span>')
    return Markup("").join(template.format(side, 100 * place, text) for place, text in axis.ticks)


def cell_ticks(names: Sequence[str], most: int, downwards: bool = False) -> list[tuple[float, str]]:
    """Return ticks in the middle of cells of equal width, about ``most`` at most; ``downwards`` begins at the top."""
    count = len(names)
    step = max(1, math.ceil(count / most))
    ticks = [((i + 0.5) / count, names[i]) for i in range(0, count, step)]
    return [(1 - place, name) for place, name in ticks] if downwards else ticks


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from at most ``low`` to at least ``high``, in steps of 1, 2 or 5 times a power of ten.

    Where ``low`` equals ``high``, the range is a tenth of it to both sides; for 0 it is 0 to 1, so that a curve that is always 0
    lies at the bottom.
    """
    if high <= low:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """Return a number as a short text for a tick."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}" if abs(value) < 1e4 else f"{value:,.0f}"


def names_legend(names: Sequence[str], dots: bool = False) -> Markup:
    """Return a legend with each series' name beside its stroke, or its dot, for those that have a name; empty for a single one."""
    if len([name for name in names if name]) < 2:
        return Markup("")
    stroke = Markup('class="dots lone s{}" d="M22 4h0"') if dots else Markup('class="line s{}" d="M1 4H27"')
    template = Markup('<span><svg class="key" viewBox="0 0 28 8" aria-hidden="true"><path {}/></svg>{}</span>')
    items = Markup("").join(template.format(stroke.format(i), escape(name)) for i, name in enumerate(names) if name)
    return Markup('<div class="legend">{}</div>').format(items)
