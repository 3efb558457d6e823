"""Checks every row of a data file before the first step: a broken row deep inside would end a run after hours."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from upcycle.errors import CheckpointError, EnvironmentFault, UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.output.locks import one_at_a_time
from upcycle.text.reading.columns import Reading
from upcycle.text.reading.compressed import opened
from upcycle.text.reading.conversations import Broken, is_blank
from upcycle.text.reading.documents import whole_piece
from upcycle.text.reading.file_kinds import FileKind

_VERSION = "3"
_SHOWN = 3  # broken rows that are named, at most
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileCheck:
    """Numbers of rows with something to learn, without, and that cannot be read; ``first`` has messages on the first of these."""

    documents: int = 0
    empty: int = 0
    broken: int = 0
    first: list[str] = field(default_factory=list)

    def __add__(self, other: FileCheck) -> FileCheck:
        first = (self.first + other.first)[:_SHOWN]
        return FileCheck(self.documents + other.documents, self.empty + other.empty, self.broken + other.broken, first)


NOTHING = FileCheck()


def check_file_rows(path: Path, kind: FileKind, reading: Reading, cache: Path, key: str) -> FileCheck:
    """Check every row of a file, once: the result is kept in ``cache``, and other processes wait for it.

    Args:
        path: the file.
        kind: its format.
        reading: how it is read.
        cache: folder of tokenised text.
        key: what the result depends on; it is kept under this key.

    Raises:
        UsageError: a row is broken and ``reading`` does not skip such rows, or the file is not UTF-8 text.
        EnvironmentFault: the file cannot be read, or the cache cannot be written.
    """
    if kind == "demo":  # known to be right
        return FileCheck()
    stem = cache / "checked" / hashlib.sha256(f"{_VERSION} {key}".encode()).hexdigest()[:32]
    with _alone(stem.with_suffix(".lock"), cache):
        kept = stem.with_suffix(".json")
        try:
            return FileCheck(**read_json(kept))
        except (CheckpointError, TypeError):
            found = _look(path, kind, reading)
        with suppress(OSError):  # a result that cannot be kept is found again next time
            unfinished = stem.with_suffix(".tmp")
            unfinished.write_text(json.dumps(asdict(found)), encoding="utf-8")
            unfinished.replace(kept)
        return found


def refused_row(row: Broken, broken: Literal["stop", "skip"]) -> FileCheck:
    """A row that cannot be trained on, as a part of a check.

    Raises:
        UsageError: such rows are not skipped.
    """
    if broken == "stop":
        raise UsageError(row.message, hint="mend or remove it, or skip such rows: set broken_lines: skip in the data")
    return FileCheck(broken=1, first=[row.message])


def _look(path: Path, kind: FileKind, reading: Reading) -> FileCheck:
    try:
        if kind == "text":
            _check_utf8(path)
            return FileCheck(documents=1)
        piece = whole_piece(path, kind)
    except OSError as error:
        raise EnvironmentFault(f"the data file {path} cannot be read: {error.strerror or error}") from None
    documents = empty = 0
    refused = FileCheck()
    for row in piece.records(reading):
        if isinstance(row, Broken):
            refused += refused_row(row, reading.broken)
        elif is_blank(row):
            empty += 1
        else:
            documents += 1
    return FileCheck(documents, empty) + refused


def _check_utf8(path: Path) -> None:
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with opened(path) as file:
        while True:
            block = file.read(_BLOCK)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = read + error.start - (len(error.object) - len(block))
                raise UsageError(
                    f"{path} is not UTF-8 text: {error.reason} near byte {at}",
                    hint="iconv turns other encodings into UTF-8",
                ) from None
            if b"\0" in block:
                raise UsageError(f"{path} holds zero bytes near byte {read + block.index(0)}: it is not text")
            if not block:
                return
            read += len(block)


@contextmanager
def _alone(lock: Path, cache: Path) -> Iterator[None]:
    """Hold a lock file, so that ranks and runs that check the same file do it one after another."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise EnvironmentFault(
            f"the cache {cache} cannot be written: {error.strerror or error}",
            hint="set cache: FOLDER in the data, on a disk with room",
        ) from None
    with one_at_a_time(lock):
        yield
