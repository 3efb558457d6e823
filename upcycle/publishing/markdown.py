"""Markdown whose words come from somewhere else: nothing in a name can become a link, a tag or a cell."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from upcycle.formatting import is_web_address

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~>])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")

_ADDRESS = re.compile(r"(?i)\b(?:[a-z][a-z0-9+.-]*://|www\.|mailto:|xmpp:)[^\s<>`]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+")


def plain(text: object) -> str:
    """Text in which Markdown and HTML mean nothing, on one line. Addresses in it are shown as code: renderers make links of
    bare ones, whatever is escaped.
    """
    line = _line(text)
    parts, end = [], 0
    for match in _ADDRESS.finditer(line):
        parts += [_escaped(line[end : match.start()]), code(match[0])]
        end = match.end()
    return "".join([*parts, _escaped(line[end:])])


def links(addresses: str) -> str:
    """Addresses, with commas between: links to those of the web, the others as text."""
    parts = [part.strip() for part in str(addresses).split(",")]
    return ", ".join(f"[{_escaped(part)}](<{part}>)" if is_web_address(part) else plain(part) for part in parts if part)


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def _line(text: object) -> str:
    """One line, in which nothing is invisible or changes the direction of writing."""
    return "".join(c for c in _CONTROL.sub(" ", str(text)) if unicodedata.category(c) not in ("Cf", "Cs")).strip()


def code(text: object) -> str:
    """A code span, on one line, that ends where it should and stays in its cell of a table."""
    line = _line(text)
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
