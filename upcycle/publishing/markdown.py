"""Writes Markdown with words from outside, so that nothing in a name can become a link, a tag or a cell."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from upcycle.formatting import is_web_address

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~>])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")

_ADDRESS = re.compile(r"(?i)\b(?:[a-z][a-z0-9+.-]*://|www\.|mailto:|xmpp:)[^\s<>`]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+")


def plain(text: object) -> str:
    """Return text on one line, with Markdown and HTML escaped.

    Addresses become code, since renderers turn bare addresses into links whatever is escaped.
    """
    line = _line(text)
    parts, end = [], 0
    for match in _ADDRESS.finditer(line):
        parts += [_escaped(line[end : match.start()]), code(match[0])]
        end = match.end()
    return "".join([*parts, _escaped(line[end:])])


def links(addresses: str) -> str:
    """Return addresses, separated by commas, as links; those that are not web addresses become text."""
    parts = [part.strip() for part in str(addresses).split(",")]
    return ", ".join(f"[{_escaped(part)}](<{part}>)" if is_web_address(part) else plain(part) for part in parts if part)


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def _line(text: object) -> str:
    """Return text on one line, without characters that are invisible or change the direction of writing."""
    return "".join(c for c in _CONTROL.sub(" ", str(text)) if unicodedata.category(c) not in ("Cf", "Cs")).strip()


def code(text: object) -> str:
    """Return a code span on one line; no backtick in the text ends it, and no bar ends its cell of a table."""
    line = _line(text)
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|")


def fenced(text: str, language: str = "") -> str:
    """Return a code block, whose fence is longer than any in the text."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: bool = True) -> str:
    """Return a table of cells that are Markdown already; with ``right``, all columns but the first are aligned right."""
    rule = ["---", *["---:" if right else "---"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
