"""Draws small pictures: an image as a model reads it, and its patches in the colours of their experts."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from upcycle.report.drawing.png import encoded

# Sixteen colours that differ in hue and lightness; expert 16 has the colour of expert 0, and so on.
COLOURS = (
    *((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (86, 180, 233), (240, 228, 66)),
    *((96, 96, 96), (150, 75, 0), (120, 94, 240), (170, 220, 130), (255, 176, 190), (20, 60, 90), (190, 190, 190)),
    *((100, 20, 60), (0, 80, 40)),
)


def colour_of(expert: int) -> tuple[int, int, int]:
    """Return the colour of an expert."""
    return COLOURS[expert % len(COLOURS)]


def grid_uri(experts: Sequence[Sequence[int]]) -> str:
    """Return a ``data:image/png`` URI with a pixel per patch in the colour of its expert, the first row on top."""
    rows = [bytes(expert % len(COLOURS) for expert in row) for row in experts]
    return encoded(rows, len(experts[0]), COLOURS)


def picture_uri(pixels: Sequence[Sequence[Sequence[int]]]) -> str:
    """Return a ``data:image/png`` URI of an image: rows of pixels, each of them red, green and blue from 0 to 255."""
    rows = [bytes(value for pixel in row for value in pixel) for row in pixels]
    return encoded(rows, len(pixels[0]), None)


def legend(experts: int) -> Markup:
    """Return which colour stands for which expert."""
    template = Markup('<span><i style="background:rgb{}"></i>{}</span>')
    shown = min(experts, len(COLOURS))
    more = Markup("<span>then the same again</span>") if experts > shown else Markup()
    return Markup('<div class="legend keys">expert {}{}</div>').format(
        Markup("").join(template.format(colour_of(i), i) for i in range(shown)), more
    )
