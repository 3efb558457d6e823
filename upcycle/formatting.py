"""Formats numbers for readers, in the same way on the terminal, in the report and on the card."""

from __future__ import annotations

import re

_WEB = re.compile(r"https?://[\w.-]+(?::\d+)?(?:[/?#][\w./?#&=%~+,:;!*$'-]*)?")


def count(number: float) -> str:
    """Return a number such as ``1.23 B``, ``134 M`` or ``3.37 M``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Return a number of bytes such as ``747 MB``, ``13.5 GB`` or ``1.2 TB``."""
    for unit, letters in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if number >= unit:
            return f"{number / unit:.3g} {letters}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """Return a time such as ``3.4 s``, ``2 min 05 s`` or ``1 h 12 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def is_web_address(text: str) -> bool:
    """Return whether a text is an http or https address without characters that could end a link or hide where it leads."""
    return bool(_WEB.fullmatch(text))
