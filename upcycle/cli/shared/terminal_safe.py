"""Makes text from outside safe to print: a terminal shows every character of it and obeys none.

Names of tensors, tokens, recipe values, chat templates and answers of a hub may hold anything: escape sequences that write to the
clipboard, overrides of the direction of writing, characters without width. Such a character is shown as Python writes it
(``\\x1b``), so that it can be found in the file that it came from.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

# Control characters, format characters (direction, width, tags), surrogates, line and paragraph separators.
_OBEYED_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# Format characters that running text needs: they join and part letters and emoji.
_JOINERS = {"\u200c", "\u200d", "\u200e", "\u200f", "\ufe0f", "\u00ad"}


def one_line(text: object) -> str:
    """Return a name or a value as one line in which every character can be seen."""
    return _replaced(str(text), _escaped, "")


def paragraph(text: object) -> str:
    """Return a message of several lines; those after the first are indented, so that none can pass for a message of its own."""
    return "\n  ".join(map(one_line, str(text).split("\n")))


def prose(text: str, kept: str = "\n\t") -> str:
    """Return running text, such as a model's, in which only the control characters in ``kept`` and those that join letters work."""
    return _replaced(text, lambda character: "\ufffd", kept)


def _replaced(text: str, replacement: Callable[[str], str], kept: str) -> str:
    if text.isprintable():
        return text
    joiners = _JOINERS if kept else set()
    return "".join(
        replacement(character)
        if unicodedata.category(character) in _OBEYED_CATEGORIES and character not in kept and character not in joiners
        else character
        for character in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
