"""The documents of one domain as a sequence of shards, each of which can be read alone: local files or a hub dataset."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from upcycle.errors import UsageError
from upcycle.text.reading.columns import Broken, choose_column, text_of
from upcycle.text.reading.documents import FilePiece, Reading, find_pieces, first_row
from upcycle.text.reading.file_kinds import Format
from upcycle.trainers.data.file_checks import FileCheck, check_file

_WHOLE = 1 << 20  # bytes; of larger files samples are hashed
_SAMPLES, _SAMPLE = 64, 1 << 14
_BYTES_PER_DOCUMENT = 4096  # of hub datasets: how many documents a shard takes is fixed, so that it can be found again


class Corpus(ABC):
    """Documents in shards. ``shards`` is their number, or ``None`` where only the end of a stream will tell."""

    shards: int | None
    column: str | None = None
    """That holds the text, once it is known; ``None`` of plain text."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while documents are read: a stream has one place

    @abstractmethod
    def documents(self, shard: int) -> Iterator[str]:
        """The documents of a shard in order; of a stream none past its end.

        Raises:
            UpcycleError: they cannot be read.
        """

    @abstractmethod
    def key(self, shard: int) -> str:
        """What decides a shard's content: equal keys, equal documents."""

    @abstractmethod
    def contents(self) -> dict[str, str]:
        """Name -> fingerprint of everything that is read, for a checkpoint to know it again."""

    def check(self, cache: Path) -> FileCheck:
        """Look at every row before any is needed, once: what was found is kept in ``cache``. Streams are not looked at.

        Raises:
            UpcycleError: a row is broken, and such rows are not left out; or a file cannot be read.
        """
        return FileCheck()

    @property
    def weight(self) -> int:
        """Bytes that :meth:`check` reads."""
        return 0

    def full(self, documents: int) -> bool:
        """Whether a shard of that many documents is not the last one of a stream."""
        return True


class LocalCorpus(Corpus):
    """Files; shards of about ``size`` bytes, smaller files together in one."""

    def __init__(self, texts: list[str], reading: Reading, size: int, named: Format | None = None) -> None:
        """Finds the files, reads a sample of each, and decides once for all of them which column holds the text.

        Raises:
            UsageError: no such file, one that is no text, or no column that all have.
        """
        super().__init__()
        pieces = find_pieces(texts, size, named)
        self._firsts = list({piece.path: piece for piece in reversed(pieces)}.values())[::-1]
        rows = [(str(piece.path), first_row(piece)) for piece in self._firsts]
        tables = [(where, row) for where, row in rows if row is not None]
        self.column = choose_column(tables, reading.column) if tables else None
        self._reading = replace(reading, column=self.column)
        self._shards = _bundled(pieces, size)
        self.shards = len(self._shards)
        self._prints = {piece.path: file_fingerprint(piece.path) for piece in self._firsts}

    @property
    def weight(self) -> int:
        """See :class:`Corpus`."""
        return sum(piece.path.stat().st_size for piece in self._firsts if piece.kind not in ("parquet", "demo"))

    def check(self, cache: Path) -> FileCheck:
        """See :class:`Corpus`."""
        found = FileCheck()
        for piece in self._firsts:
            key = repr((str(piece.path.resolve()), _changed(piece.path), self._prints[piece.path], self._reading))
            found += check_file(piece.path, piece.kind, self._reading, cache, key)
        return found

    def documents(self, shard: int) -> Iterator[str]:
        """See :class:`Corpus`. A file that is not what it was when it was found is not read."""
        for piece in self._shards[shard]:
            if piece.path.exists() and file_fingerprint(piece.path) != self._prints[piece.path]:
                raise UsageError(
                    f"the data file {piece.path} changed while it was in use",
                    hint="put back what it was, then continue",
                )
            yield from piece.documents(self._reading)

    def key(self, shard: int) -> str:
        """Where and when, too: a sample alone does not see every change."""
        pieces = [
            (str(p.path.resolve()), _changed(p.path), self._prints[p.path], p.start, p.stop)
            for p in self._shards[shard]
        ]
        return repr((self._reading, pieces))

    def contents(self) -> dict[str, str]:
        """See :class:`Corpus`."""
        return {str(path): fingerprint for path, fingerprint in self._prints.items()}


class HubCorpus(Corpus):
    """A hub dataset, streamed: shards are its documents in order, a fixed number in each."""

    shards = None

    def __init__(self, name: str, reading: Reading, revision: str | None, size: int) -> None:
        super().__init__()
        self._name, self._reading, self._revision = name, reading, revision
        self.column = reading.column
        self._per_shard = max(16, size // _BYTES_PER_DOCUMENT)
        self._rows: Iterator[Any] = iter(())
        self._next = -1  # the shard that ``_rows`` is at

    def documents(self, shard: int) -> Iterator[str]:
        """See :class:`Corpus`. Shards in order are read on; others are skipped to."""
        from upcycle.text.hub_dataset import hub_rows

        if shard != self._next:
            self._rows = hub_rows(self._name, self._revision, skip=shard * self._per_shard)
        self._next = -1  # an error on the way leaves it nowhere
        for number in range(self._per_shard):
            row = next(self._rows, None)
            if row is None:
                return
            where = f"{self._name}, row {shard * self._per_shard + number}"
            if self.column is None:
                self.column = choose_column([(where, row)], None)
            text = text_of(row, self.column, where)
            if not isinstance(text, Broken):
                yield text
            elif self._reading.broken == "stop":
                raise UsageError(text.message, hint="column: NAME in the domain, or broken_lines: skip")
            else:
                yield ""  # keeps its place: a shard is found again by the number of documents before it
        self._next = shard + 1

    def key(self, shard: int) -> str:
        """See :class:`Corpus`."""
        return repr((self._name, self._revision, self._reading, self._per_shard, shard))

    def contents(self) -> dict[str, str]:
        """See :class:`Corpus`."""
        return {self._name: f"{self._revision or 'latest'}, {self._per_shard} documents a shard"}

    def full(self, documents: int) -> bool:
        """See :class:`Corpus`."""
        return documents == self._per_shard


def open_corpus(
    texts: list[str],
    column: str | None,
    separator: str | None,
    revision: str | None,
    size: int,
    domain: str,
    broken: Literal["stop", "skip"] = "stop",
    named: Format | None = None,
) -> Corpus:
    """Files, or the one hub dataset that ``texts`` names.

    Raises:
        UsageError: no such file, several datasets in one domain, or a revision of files.
    """
    from upcycle.text.hub_dataset import is_dataset

    reading = Reading(column, separator, broken)
    hub = [name for name in texts if is_dataset(name)]
    if not hub:
        if revision:
            raise UsageError(f"domain '{domain}': a revision is for hub datasets, and {texts[0]} is a file")
        return LocalCorpus(texts, reading, size, named)
    if len(texts) > 1:
        raise UsageError(
            f"domain '{domain}': the hub dataset {hub[0]} is not alone", hint="one domain for each dataset"
        )
    return HubCorpus(hub[0], reading, revision, size)


def file_fingerprint(path: Path) -> str:
    """16 hexadecimal digits of size and content: all of it up to 1 MiB, of larger files 64 evenly spread samples."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _bundled(pieces: list[FilePiece], size: int) -> list[list[FilePiece]]:
    shards: list[list[FilePiece]] = []
    weight = size
    for piece in pieces:
        if weight + piece.size > size:
            shards.append([])
            weight = 0
        shards[-1].append(piece)
        weight += piece.size
    return shards
