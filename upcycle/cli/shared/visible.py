"""Text from somewhere else, made so that a terminal shows it and obeys none of it.

Names of tensors, tokens, recipe values, chat templates and answers of a hub may hold anything: escape sequences that write to the
clipboard, overrides of the direction of writing, characters without width. What a terminal would obey is shown as Python writes it
(``\\x1b``), so that it can be found in the file that it came from.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

# Control characters, format characters (direction, width, tags), surrogates, line and paragraph separators.
_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
# In running text these have a meaning of their own: they join and part letters and emoji.
_JOINERS = {"\u200c", "\u200d", "\u200e", "\u200f", "\ufe0f", "\u00ad"}


def one_line(text: object) -> str:
    """A name or a value: one line, in which every character can be seen."""
    return _replaced(str(text), _escaped, "")


def paragraph(text: object) -> str:
    """A message of several lines; those behind the first are indented, so that none can pass for the beginning of another."""
    return "\n  ".join(map(one_line, str(text).split("\n")))


def prose(text: str, kept: str = "\n\t") -> str:
    """What a model wrote: line feeds and tabs work, letters are joined as in its language, nothing else is obeyed."""
    return _replaced(text, lambda character: "\ufffd", kept)


def _replaced(text: str, shown: Callable[[str], str], kept: str) -> str:
    if text.isprintable():
        return text
    joiners = _JOINERS if kept else set()
    return "".join(
        shown(character)
        if unicodedata.category(character) in _OBEYED and character not in kept and character not in joiners
        else character
        for character in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
