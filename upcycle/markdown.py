"""Markdown whose words come from somewhere else: nothing in a name can become a link, a tag or a cell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~>])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def plain(text: object) -> str:
    """Text in which Markdown and HTML mean nothing, on one line."""
    line = _CONTROL.sub(" ", str(text)).strip()
    return _SPECIAL.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def code(text: object) -> str:
    """A code span, on one line, that ends where it should and stays in its cell of a table."""
    line = _CONTROL.sub(" ", str(text)).strip()
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|")


def fenced(text: str, language: str = "") -> str:
    """A block of code, whatever it holds."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: bool = True) -> str:
    """A table of cells that are Markdown already; all columns but the first are aligned ``right``."""
    rule = ["---", *["---:" if right else "---"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
