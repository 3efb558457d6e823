"""Decides which column of rows holds the text, once for all files of a domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from upcycle.errors import UsageError
from upcycle.text.reading.parquet_files import type_name

_USUAL = ("text", "content")
_CHATS = ("messages", "conversations", "conversation")
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
_PREFERENCES = ("chosen", "rejected")


class Broken(NamedTuple):
    """A row that cannot be read; the message says where it is and why."""

    message: str


def choose_column(rows: Iterable[tuple[str, Any]], column: str | None) -> str:
    """Return the column that holds the text in every file: ``column``, or ``text``, ``content``, or the only one of strings.

    Args:
        rows: for each file, the place of its first row, and that row (a mapping of column to value).
        column: the column that the user named, if any.

    Raises:
        UsageError: no column holds text, or several may be meant; the message lists the columns.
    """
    found = list(rows)
    for where, row in found:
        if not isinstance(row, Mapping):
            raise UsageError(f"{where}: a row is {type(row).__name__}, not columns by name", hint='{"text": ...}')
        if column and column not in row:
            raise UsageError(f"{where}: no column '{column}'; {_listed(row)}", hint="column: NAME in the domain")
    if column is None:
        column = _guessed(found)
    for where, row in found:
        if not isinstance(row[column], str | None):
            raise UsageError(
                f"{where}: column '{column}' holds {type_name(row[column])}, not text; {_listed(row)}",
                hint="column: NAME in the domain",
            )
    return column


def text_of(row: Any, column: str, where: str) -> str | Broken:
    """Return a row's text, or why it has none; null counts as empty text."""
    if not isinstance(row, Mapping):
        return Broken(f"{where}: a row is {type(row).__name__}, not columns by name")
    if column not in row:
        return Broken(f"{where}: no column '{column}'; {_listed(row)}")
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        return Broken(f"{where}: column '{column}' holds {type(value).__name__}, not text")
    return value


def _guessed(rows: list[tuple[str, Any]]) -> str:
    for name in _USUAL:
        if all(name in row for _, row in rows):
            return name
    texts = [{name for name, value in row.items() if isinstance(value, str)} for _, row in rows]
    common = set.intersection(*texts) if texts else set()
    if len(common) == 1 and all(len(names) == 1 for names in texts):
        return str(common.pop())
    where, row = rows[0]
    chat = _chat(row)
    if chat:
        raise UsageError(
            f"{where}: {chat}, but training needs one column of text; {_listed(row)}",
            hint="write every example as one text with the model's chat template "
            "(tokenizer.apply_chat_template(messages, tokenize=False)) into a column 'text'",
        )
    others = next(((w, r) for (w, r), names in zip(rows, texts, strict=True) if names != texts[0]), None)
    differs = f"; in {others[0]} {_listed(others[1])}" if others else ""
    raise UsageError(
        f"{where}: not every file has a column 'text' or 'content', or a single column of strings; {_listed(row)}{differs}",
        hint="column: NAME in the domain",
    )


def _chat(row: Mapping[str, Any]) -> str | None:
    names = set(row)
    for name in _CHATS:
        if name in names:
            return f"column '{name}' holds conversations"
    if set(_PREFERENCES) <= names:
        return "the rows are pairs of a chosen and a rejected answer"
    for pair in _PAIRS:
        if set(pair) <= names:
            return f"the rows are pairs of '{pair[0]}' and '{pair[1]}'"
    return None


def _listed(row: Mapping[str, Any]) -> str:
    return f"the columns are {', '.join(sorted(map(str, row)))}"
