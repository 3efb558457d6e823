"""Checks every row of a data file before the first step: a broken row deep inside would end a run after hours."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from upcycle.errors import CheckpointError, EnvironmentFault, UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.output.locks import one_at_a_time
from upcycle.text.reading.documents import FilePiece, Reading
from upcycle.text.reading.file_kinds import FileKind

_VERSION = "1"
_SHOWN = 3  # broken rows that are named, at most
_BLOCK = 1 << 20


@dataclass(frozen=True)
class FileCheck:
    """Numbers of rows with text, without, and that cannot be read; ``first`` has messages on the first of these."""

    documents: int = 0
    empty: int = 0
    broken: int = 0
    first: list[str] = field(default_factory=list)

    def __add__(self, other: FileCheck) -> FileCheck:
        first = (self.first + other.first)[:_SHOWN]
        return FileCheck(self.documents + other.documents, self.empty + other.empty, self.broken + other.broken, first)


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
    # The columns of Parquet files were checked when they were opened, and embedded texts are known to be right.
    if kind in ("parquet", "demo"):
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


def _look(path: Path, kind: FileKind, reading: Reading) -> FileCheck:
    try:
        size = path.stat().st_size
        if kind == "text":
            _check_utf8(path)
            return FileCheck(documents=1)
    except OSError as error:
        raise EnvironmentFault(f"the data file {path} cannot be read: {error.strerror or error}") from None
    documents = empty = broken = 0
    first: list[str] = []
    for row in FilePiece(path, kind, 0, size, size).records(reading):
        if isinstance(row, str):
            documents += bool(row.strip())
            empty += not row.strip()
            continue
        if reading.broken == "stop":
            raise UsageError(
                row.message,
                hint="mend or remove it, or skip such rows: set broken_lines: skip in the data",
            )
        broken += 1
        if len(first) < _SHOWN:
            first.append(row.message)
    return FileCheck(documents, empty, broken, first)


def _check_utf8(path: Path) -> None:
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
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
