"""Docstrings as Markdown: literals, references to code, and the sections of arguments, returns and errors."""

from __future__ import annotations

import inspect
import re

_SECTIONS = {"Args:": "Arguments", "Returns:": "Returns", "Raises:": "Raises", "Yields:": "Yields"}


def as_markdown(docstring: str | None) -> str:
    """Return a docstring as Markdown; every argument, return value and error is an item of a list."""
    blocks: list[str] = []
    section: list[str] | None = None
    for line in inspect.cleandoc(docstring or "").splitlines():
        if line.strip() in _SECTIONS and not line.startswith(" "):
            section = []
            blocks += ["", f"**{_SECTIONS[line.strip()]}**", ""]
        elif section is None or (line and not line.startswith(" ")):
            blocks += [""] if section is not None else []
            section = None
            blocks.append(line)
        elif line.startswith("     "):  # goes on
            blocks[-1] += " " + line.strip()
        elif line.strip():
            name, colon, text = line.strip().partition(": ")
            blocks.append(f"- `{name}`: {text}" if colon and re.fullmatch(r"[\w*, ]+", name) else f"- {line.strip()}")
    return inline(re.sub(r"\n{3,}", "\n\n", "\n".join(blocks)).strip())


def inline(text: str) -> str:
    """Return reStructuredText's literals and references to code as Markdown's."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")
