"""Draws horizontal bars, each with its number beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from upcycle.report.drawing.frame import values_block


@dataclass(frozen=True)
class Bar:
    """One bar; ``kind`` 0 is the parent, 1 the model."""

    label: str
    value: float
    text: str
    kind: int


@dataclass(frozen=True)
class BarChart:
    """Bars in rows that begin at zero and share one scale; ``unit`` is the label of the axis."""

    title: str
    reading: str
    bars: Sequence[Bar]
    unit: str

    def __html__(self) -> str:
        longest = max((bar.value for bar in self.bars), default=0.0) or 1.0
        rows = Markup("").join(
            Markup(
                '<span class="name">{}</span><span class="track"><i class="k{}" style="width:{:.2f}%"></i></span>'
                '<span class="value">{}</span>'
            ).format(bar.label, bar.kind, 100 * max(0.0, bar.value) / longest, bar.text)
            for bar in self.bars
        )
        values = {
            "kind": "bars",
            "unit": self.unit,
            "names": [bar.label for bar in self.bars],
            "values": [bar.value for bar in self.bars],
        }
        listed = "; ".join(f"{bar.label}: {bar.text}" for bar in self.bars)
        return str(
            Markup(
                '<figure class="plot"><figcaption><strong>{}</strong> {}</figcaption>'
                '<div class="bars area" role="img" aria-label="{}">{}</div><div class="xlabel">{}</div>{}</figure>'
            ).format(
                self.title,
                self.reading,
                f"{self.title} {self.reading} {listed}. Axis: {self.unit}.",
                rows,
                self.unit,
                values_block(values),
            )
        )
