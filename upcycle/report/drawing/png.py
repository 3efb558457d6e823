"""Encodes matrices as PNG data URIs, with a palette of 256 colours and a pixel per cell."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

# From blue over near white to orange, which people with any common colour blindness can tell apart.
STOPS = ((8, 64, 126), (107, 174, 214), (245, 243, 238), (253, 154, 79), (140, 45, 4))
NO_DATA = (128, 128, 128)
_LEVELS = 255


def palette() -> list[tuple[int, int, int]]:
    """Return 255 colours from the first stop to the last, and then the colour of cells without a number."""
    colours = []
    for level in range(_LEVELS):
        place = level / (_LEVELS - 1) * (len(STOPS) - 1)
        first = min(int(place), len(STOPS) - 2)
        part = place - first
        low, high = STOPS[first], STOPS[first + 1]
        colours.append(tuple(round(a + part * (b - a)) for a, b in zip(low, high, strict=True)))
    return [*colours, NO_DATA]  # type: ignore[list-item]


def level(value: float | None, low: float, high: float) -> int:
    """Return the palette index of a number; numbers outside ``low`` to ``high`` take the colour of the nearer end."""
    if value is None or not math.isfinite(value):
        return _LEVELS
    part = min(1.0, max(0.0, (value - low) / (high - low)))
    return round(part * (_LEVELS - 1))


def png_uri(matrix: Sequence[Sequence[float | None]], low: float, high: float) -> str:
    """Return a matrix as ``data:image/png;base64,...``, its first row on top; short rows are filled with empty cells.

    Format: https://www.w3.org/TR/png-3/ (colour type 3, 8 bits).
    """
    width = max((len(row) for row in matrix), default=0)
    rows = []
    for row in matrix:
        cells = [level(value, low, high) for value in row]
        rows.append(bytes([*cells, *[_LEVELS] * (width - len(cells))]))
    return encoded(rows, width, palette())


def encoded(rows: Sequence[bytes], width: int, colours: Sequence[tuple[int, int, int]] | None) -> str:
    """Return rows of pixels as ``data:image/png;base64,...``.

    Args:
        rows: of each row, a byte per pixel, its place in ``colours``; without these three bytes, red, green and blue.
        width: pixels per row.
        colours: at most 256.
    """
    lines = b"".join(b"\0" + row for row in rows)
    header = struct.pack(">IIBBBBB", width, len(rows), 8, 2 if colours is None else 3, 0, 0, 0)
    table = [] if colours is None else [(b"PLTE", b"".join(bytes(colour) for colour in colours))]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), *table, (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
