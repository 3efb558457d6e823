"""Numbers in words: the same on the terminal, in the report and on the card."""

from __future__ import annotations

import re

_WEB = re.compile(r"https?://[\w.-]+(?::\d+)?(?:[/?#][\w./?#&=%~+,:;!*$'-]*)?")


def count(number: float) -> str:
    """``1.23 B``, ``134.5 M``, ``3.37 M``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """``747 MB``, ``13.5 GB``, ``1.2 TB``."""
    for unit, letters in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if number >= unit:
            return f"{number / unit:.3g} {letters}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """``3.4 s``, ``2 min 05 s``, ``1 h 12 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def is_web_address(text: str) -> bool:
    """Whether a link may lead there: http or https, and nothing that ends the link or hides where it leads."""
    return bool(_WEB.fullmatch(text))
