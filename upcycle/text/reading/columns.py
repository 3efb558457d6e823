"""Decides what the columns of rows hold, once for all files of a domain: text, conversations, or prompts and responses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from upcycle.errors import UsageError
from upcycle.text.reading.conversations import BESIDE, Broken, TextOrExample, conversation, pair, preference
from upcycle.text.reading.images_in_rows import COLUMNS as IMAGE_COLUMNS
from upcycle.text.reading.images_in_rows import has_images
from upcycle.text.reading.table_rows import holds_list, type_name

RowKind: TypeAlias = Literal["text", "chat", "pairs", "preferences"]

_USUAL = ("text", "content")
CHATS = ("messages", "conversations", "conversation")  # columns that hold them, by their usual names
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
_INPUTS = ("input", "context")  # what many sets of pairs have besides, which must not be lost
_PREFERENCES = ("chosen", "rejected")


@dataclass(frozen=True)
class Reading:
    """How documents are read from files.

    Attributes:
        column: the column with the text or the conversation, for files of rows.
        separator: the text between documents, for plain text; None: a piece is one document.
        broken: what to do at a broken row.
        prompt: the columns of the prompt, for pairs.
        response: the column of the response, for pairs; of the better one, for preferences.
        rejected: the column of the worse response, for preferences.
        kind: what rows hold, once :func:`choose_reading` has seen them.
        images: whether rows have images: of examples ``maybe`` becomes ``yes`` where the first row of a file has one.
        folder: what their names are relative to; None: the folder of their file.
    """

    column: str | None = None
    separator: str | None = None
    broken: Literal["stop", "skip"] = "stop"
    prompt: tuple[str, ...] = ()
    response: str | None = None
    rejected: str | None = None
    kind: RowKind = "text"
    images: Literal["no", "maybe", "yes"] = "no"
    folder: str | None = None

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The columns that are read, of those that a table may have; None: none are known yet."""
        images = IMAGE_COLUMNS if self.images == "yes" else ()
        if self.response is not None:
            return (*self.prompt, self.response, *((self.rejected, *BESIDE) if self.rejected else ()), *images)
        return None if self.column is None else (self.column, *((*BESIDE, *images) if self.kind == "chat" else ()))

    @property
    def images_in(self) -> str | None:
        """The folder of images; None: rows have none."""
        return (self.folder or "") if self.images == "yes" else None

    def of_file(self, path: Path) -> Reading:
        """The same for one file, beside which images are, unless a folder was named."""
        return self if self.images != "yes" or self.folder else replace(self, folder=str(path.parent))

    def seen(self, kind: RowKind, rows: Iterable[Any]) -> Reading:
        """The same with what the first row of each file shows."""
        images = "yes" if self.images == "maybe" and kind != "text" and any(map(has_images, rows)) else self.images
        return replace(self, kind=kind, images="no" if images == "maybe" or kind == "text" else images)


def choose_reading(rows: Iterable[tuple[str, Any]], reading: Reading) -> Reading:
    """Return how all files are read: what their rows hold, and in which columns.

    Args:
        rows: for each file, the place of its first row, and that row (a mapping of column to value).
        reading: what the user named.

    Raises:
        UsageError: no column holds text or conversations, or several may be meant; the message lists the columns.
    """
    found = list(rows)
    if reading.response is not None:
        for where, row in found:
            _check_mapping(where, row)
            for name in (*reading.prompt, reading.response, *([reading.rejected] if reading.rejected else [])):
                if name not in row:
                    raise UsageError(
                        f"{where}: no column '{name}'; {_listed(row)}", hint="name the columns in the domain"
                    )
        return reading.seen("pairs" if reading.rejected is None else "preferences", (row for _, row in found))
    column = choose_column(found, reading.column)
    kind: RowKind = "chat" if any(_is_chat(column, row[column]) for _, row in found) else "text"
    return replace(reading, column=column).seen(kind, (row for _, row in found))


def choose_column(rows: Iterable[tuple[str, Any]], column: str | None) -> str:
    """Return the column that holds the text or the conversation in every file.

    That is ``column``, or ``text``, ``content``, ``messages``, ``conversations``, or the only one of strings.

    Args:
        rows: for each file, the place of its first row, and that row (a mapping of column to value).
        column: the column that the user named, if any.

    Raises:
        UsageError: no column holds text, or several may be meant; the message lists the columns.
    """
    found = list(rows)
    for where, row in found:
        _check_mapping(where, row)
        if column and column not in row:
            raise UsageError(f"{where}: no column '{column}'; {_listed(row)}", hint="column: NAME in the domain")
    if column is None:
        column = _guessed(found)
    for where, row in found:
        if not isinstance(row[column], str | None) and not holds_list(row[column]):
            raise UsageError(
                f"{where}: column '{column}' holds {type_name(row[column])}, not text; {_listed(row)}",
                hint="column: NAME in the domain",
            )
    return column


def document_of(row: Any, reading: Reading, where: object) -> TextOrExample | Broken:
    """Return a row's document, or why it has none; null counts as empty text."""
    if not isinstance(row, Mapping):
        return Broken(f"{where}: a row is {type(row).__name__}, not columns by name")
    if reading.response is not None:
        if reading.rejected is None:
            return pair(row, reading.prompt, reading.response, where, reading.images_in)
        return preference(row, reading.prompt, reading.response, reading.rejected, where, reading.images_in)
    return _of_column(row, reading, where)


def _of_column(row: Mapping[str, Any], reading: Reading, where: object) -> TextOrExample | Broken:
    assert reading.column is not None
    if reading.column not in row:
        return Broken(f"{where}: no column '{reading.column}'; {_listed(row)}")
    value = row[reading.column]
    if reading.kind == "chat":
        return conversation(value, row, reading.column, where, reading.images_in)
    if not isinstance(value, str | None):
        return Broken(f"{where}: column '{reading.column}' holds {type(value).__name__}, not text")
    return value or ""


def _check_mapping(where: str, row: Any) -> None:
    if not isinstance(row, Mapping):
        raise UsageError(f"{where}: a row is {type(row).__name__}, not columns by name", hint='{"text": ...}')


def _guessed(rows: list[tuple[str, Any]]) -> str:
    for name in (*_USUAL, *CHATS):
        if all(name in row for _, row in rows) and (
            name in _USUAL or all(_is_chat(name, row[name]) for _, row in rows)
        ):
            return name
    texts = [{name for name, value in row.items() if isinstance(value, str)} for _, row in rows]
    common = set.intersection(*texts) if texts else set()
    if len(common) == 1 and all(len(names) == 1 for names in texts):
        return str(common.pop())
    where, row = rows[0]
    if set(_PREFERENCES) <= set(row):
        raise UsageError(
            f"{where}: the rows are pairs of a chosen and a rejected answer; {_listed(row)}",
            hint="name both columns in the domain, chosen: chosen and rejected: rejected (and prompt, if it is in a column of its "
            "own), or learn the chosen answers alone: column: chosen",
        )
    for prompt, response in _PAIRS:
        if {prompt, response} <= set(row):
            beside = [name for name in _INPUTS if name in row]
            given = f"[{', '.join([prompt, *beside])}]" if beside else prompt
            raise UsageError(
                f"{where}: the rows are pairs of '{prompt}' and '{response}'; {_listed(row)}",
                hint=f"name both columns in the domain: prompt: {given} and response: {response}",
            )
    others = next(((w, r) for (w, r), names in zip(rows, texts, strict=True) if names != texts[0]), None)
    differs = f"; in {others[0]} {_listed(others[1])}" if others else ""
    raise UsageError(
        f"{where}: not every file has a column 'text' or 'content', or a single column of strings; {_listed(row)}{differs}",
        hint="column: NAME in the domain",
    )


def _is_chat(name: str, value: Any) -> bool:
    """Whether a column's value is a conversation: a list, or, under a usual name, JSON that begins like one."""
    return holds_list(value) or (name in CHATS and isinstance(value, str) and value.lstrip().startswith("["))


def _listed(row: Mapping[str, Any]) -> str:
    return f"the columns are {', '.join(sorted(map(str, row)))}"
