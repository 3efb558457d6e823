"""A terminal session as one animated SVG: an emulated screen, its frames one below the other, and a window that steps over them.

It needs no script and no player, so it runs where a picture may stand; who asked for less motion sees the last frame.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from typing import Any

from terminal import QUESTION

LONGEST, SHORTEST = 1.5, 0.2  # seconds that a frame is shown: waiting is cut, and what follows at once is one frame
ASKED, READ, LAST = 0.9, 3.5, 8.0  # ... a question, what a command has printed, and the end
COMMAND = 5.0  # for the work of one command, at most about
KEY = 0.045  # seconds per typed character
CELL, LINE, MARGIN = 8.4, 19, 14  # of 14-pixel letters
_INK, _PAPER = "#d6dce2", "#14171b"
_COLORS = {
    "black": "#5c6670",
    "red": "#ff8a80",
    "green": "#4fd1ab",
    "brown": "#f0b850",
    "blue": "#62b5f0",
    "magenta": "#d9a0e0",
    "cyan": "#56c8d8",
    "white": "#e6e9ec",
}
_NUMBER = re.compile("[0-9a-f]{6}")  # of a colour without a name
Frame = tuple[str, ...]


@dataclass
class Film:
    """What a terminal showed, frame by frame.

    Attributes:
        rows: of the screen.
        columns: of the screen.
        frames: the rows of each, as SVG.
        seconds: for which each is shown.
    """

    rows: int
    columns: int
    frames: list[Frame] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        import pyte

        self._screen = pyte.Screen(self.columns, self.rows)
        self._stream = pyte.ByteStream(self._screen)

    def typed(self, command: str) -> None:
        """A prompt, and a command typed at it in a few steps."""
        self._stream.feed(b"\x1b[1;32m$\x1b[0m ")
        for start in range(0, len(command), 4):
            self._stream.feed(command[start : start + 4].encode())
            self._shot(KEY * 4)
        self._shot(0.5)
        self._stream.feed(b"\r\n")

    def printed(self, blocks: Sequence[tuple[float, bytes]]) -> None:
        """What a command printed, each block with the seconds since it began; long work and long waits are shown shorter."""
        quicker = min(1.0, COMMAND / max(blocks[-1][0], 1e-9))
        waiting = before = 0.0
        for at, block in blocks:
            waiting += (at - before) * quicker
            before = at
            if waiting >= SHORTEST:
                self._shot(min(waiting, LONGEST))
                waiting = 0.0
            self._stream.feed(block)
            if QUESTION.search(block):
                self._shot(ASKED)
        self._shot(READ)

    def svg(self, title: str) -> str:
        """The whole film as SVG text."""
        width, height = self.columns * CELL + 2 * MARGIN, self.rows * LINE + 2 * MARGIN
        self.seconds[-1] = LAST
        total, at, steps = sum(self.seconds), 0.0, []
        for number, seconds in enumerate(self.seconds):
            steps.append(f"{100 * at / total:.3f}%{{transform:translateY(-{number * self.rows * LINE}px)}}")
            at += seconds
        last = (len(self.frames) - 1) * self.rows * LINE
        names = {row: f"r{number}" for number, row in enumerate(dict.fromkeys(r for f in self.frames for r in f if r))}
        drawn = [f'<g id="{name}">{row}</g>' for row, name in names.items()]
        placed = [
            f'<use href="#{names[row]}" y="{(number * self.rows + place) * LINE}"/>'
            for number, frame in enumerate(self.frames)
            for place, row in enumerate(frame)
            if row
        ]
        colors = "".join(f".{name}{{fill:{color}}}" for name, color in _COLORS.items())
        size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
        return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">
<title>{escape(title)}</title>
<style>
text{{font:14px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;fill:{_INK};white-space:pre}}
.b{{font-weight:bold}}{colors}
.film{{animation:film {total:.2f}s steps(1,end) infinite}}
@keyframes film{{{"".join(steps)}100%{{transform:translateY(-{last}px)}}}}
@media (prefers-reduced-motion:reduce){{.film{{animation:none;transform:translateY(-{last}px)}}}}
</style>
<rect width="100%" height="100%" rx="8" fill="{_PAPER}"/>
<defs>{"".join(drawn)}</defs>
<svg x="{MARGIN}" y="{MARGIN}" width="{self.columns * CELL:g}" height="{self.rows * LINE}"><g class="film">
{"".join(placed)}
</g></svg>
</svg>
"""

    def _shot(self, seconds: float) -> None:
        """Note what the screen shows, or that it shows the same for longer."""
        lines = [self._screen.buffer[row] for row in range(self.rows)]
        frame = tuple(_row([line[column] for column in range(self.columns)]) for line in lines)
        if self.frames and self.frames[-1] == frame:
            self.seconds[-1] += seconds
        else:
            self.frames.append(frame)
            self.seconds.append(seconds)


def _row(cells: Sequence[Any]) -> str:
    """One row as SVG, a text for every run of cells that look the same; each is as wide as its cells in any font."""
    parts, column = [], 0
    for (color, bold), run in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
        letters = "".join(cell.data for cell in run)
        shown = letters.strip()
        start, column = column + len(letters) - len(letters.lstrip()), column + len(letters)
        if shown:
            kind = " ".join(filter(None, (_class(color), "b" if bold else "")))
            look = f' class="{kind}"' if kind else ""
            look += f' style="fill:#{color}"' if _NUMBER.fullmatch(color) else ""
            width = f' textLength="{len(shown) * CELL:.1f}"' if len(shown) > 1 else ""
            parts.append(f'<text x="{start * CELL:.1f}" y="{LINE - 5}"{width}{look}>{escape(shown)}</text>')
    return "".join(parts)


def _class(color: str) -> str:
    """The class of a colour that has a name; of bright ones that of the plain one."""
    name = color.removeprefix("bright")
    return name if name in _COLORS else ""
