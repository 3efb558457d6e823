"""The documents of one domain, from local files or a hub dataset, in shards that can each be read on their own."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from upcycle.errors import UsageError
from upcycle.text.reading.columns import CHATS, Reading, RowKind, choose_reading, document_of
from upcycle.text.reading.conversations import Broken, TextOrExample
from upcycle.text.reading.documents import FilePiece, find_pieces, first_row
from upcycle.text.reading.file_kinds import Format
from upcycle.trainers.data.file_checks import FileCheck, check_file_rows

_WHOLE = 1 << 20  # bytes up to which a file is hashed as a whole; of larger ones, samples are
_SAMPLES, _SAMPLE = 64, 1 << 14  # how many, and bytes of each
_BYTES_PER_DOCUMENT = (
    4096  # assumed for hub datasets, whose shards have a fixed number of documents to be found again by
)


class Corpus(ABC):
    """Documents in shards.

    ``shards`` is their number, or ``None`` for a stream whose length is not known. ``reading`` says how they are read, and, once
    that is known, in which columns.
    """

    shards: int | None

    def __init__(self, reading: Reading | None = None) -> None:
        self.reading = reading or Reading()
        self.lock = threading.Lock()  # to be held while documents are read: a stream has one position

    @property
    def kind(self) -> RowKind:
        """What its documents are: text, or examples out of conversations or pairs."""
        return self.reading.kind

    @property
    def pictured(self) -> bool:
        """Whether its examples have images."""
        return self.reading.images == "yes"

    @abstractmethod
    def documents(self, shard: int) -> Iterator[TextOrExample]:
        """The documents of a shard in order; none past the end of a stream.

        Raises:
            UpcycleError: they cannot be read.
        """

    @abstractmethod
    def key(self, shard: int) -> str:
        """A key of a shard's content: shards with equal keys hold equal documents."""

    @abstractmethod
    def contents(self) -> dict[str, str]:
        """Name -> fingerprint of every file or dataset that is read, by which a checkpoint recognises them."""

    def check(self, cache: Path) -> FileCheck:
        """Read every row before any is needed, once: the result is kept in ``cache``. Streams are not checked.

        Raises:
            UpcycleError: a row is broken and broken rows are not skipped, or a file cannot be read.
        """
        return FileCheck()

    @property
    def weight(self) -> int:
        """Number of bytes that :meth:`check` reads."""
        return 0

    def full(self, documents: int) -> bool:
        """Whether a shard with that many documents is full, so that it is not the last of a stream."""
        return True


class LocalCorpus(Corpus):
    """Local files, in shards of about ``size`` bytes; small files share a shard."""

    def __init__(self, texts: list[str], reading: Reading, size: int, named: Format | None = None) -> None:
        """Find the files, read the first row of each, and choose the column that holds the text in all of them.

        Args:
            texts: files or globs.
            reading: how to read them.
            size: bytes per shard.
            named: the format of all files; ``None``: by their endings.

        Raises:
            UsageError: there is no such file, a file is not text, or the files have no such column in common.
        """
        pieces = find_pieces(texts, size, named)
        self._firsts = list({piece.path: piece for piece in reversed(pieces)}.values())[::-1]
        rows = [(str(piece.path), first_row(piece)) for piece in self._firsts]
        tables = [(where, row) for where, row in rows if row is not None]
        super().__init__(choose_reading(tables, reading) if tables else replace(reading, column=None))
        plain = next((where for where, row in rows if row is None), None)
        if plain and (self.kind != "text" or reading.response is not None):
            raise UsageError(
                f"{plain} is plain text, without columns, and its domain is one of conversations or pairs",
                hint="make a domain of its own for plain text",
            )
        self._shards = _bundled(pieces, size)
        self.shards = len(self._shards)
        self._prints = {piece.path: file_fingerprint(piece.path) for piece in self._firsts}

    @property
    def weight(self) -> int:
        """See :class:`Corpus`."""
        return sum(piece.path.stat().st_size for piece in self._firsts if piece.kind != "demo")

    def check(self, cache: Path) -> FileCheck:
        """See :class:`Corpus`."""
        found = FileCheck()
        for piece in self._firsts:
            key = repr((str(piece.path.resolve()), _modified(piece.path), self._prints[piece.path], self.reading))
            found += check_file_rows(piece.path, piece.kind, self.reading, cache, key)
        return found

    def documents(self, shard: int) -> Iterator[TextOrExample]:
        """See :class:`Corpus`. A file that has changed since it was found is refused."""
        for piece in self._shards[shard]:
            if piece.path.exists() and file_fingerprint(piece.path) != self._prints[piece.path]:
                raise UsageError(
                    f"the data file {piece.path} changed while it was in use",
                    hint="restore the file, then continue",
                )
            yield from piece.documents(self.reading)

    def key(self, shard: int) -> str:
        """See :class:`Corpus`. Paths and times are part of it, because a fingerprint of samples does not see every change."""
        pieces = [
            (str(p.path.resolve()), _modified(p.path), self._prints[p.path], p.start, p.stop)
            for p in self._shards[shard]
        ]
        return repr((self.reading, pieces))

    def contents(self) -> dict[str, str]:
        """See :class:`Corpus`."""
        return {str(path): fingerprint for path, fingerprint in self._prints.items()}


class HubCorpus(Corpus):
    """A hub dataset, streamed: every shard is the next fixed number of its documents."""

    shards = None

    def __init__(self, name: str, reading: Reading, revision: str | None, size: int) -> None:
        if reading.images == "yes":
            raise UsageError(
                f"{name} is a hub dataset, of which images are not read",
                hint="save it as files of rows and images, and name these",
            )
        reading = replace(reading, images="no")
        # What rows hold must be known before any is read, because a run may continue from its cache without a network.
        kind: RowKind = "chat" if reading.column in CHATS else "text"
        if reading.response is not None:
            kind = "pairs" if reading.rejected is None else "preferences"
        super().__init__(replace(reading, kind=kind))
        self._name, self._revision, self._key = name, revision, repr(self.reading)
        self._per_shard = max(16, size // _BYTES_PER_DOCUMENT)
        self._rows: Iterator[Any] = iter(())
        self._next = -1  # the shard at whose beginning ``_rows`` stands

    def documents(self, shard: int) -> Iterator[TextOrExample]:
        """See :class:`Corpus`. Shards are read in order from one stream; any other order starts a new one and skips."""
        from upcycle.text.hub_dataset import hub_rows

        if shard != self._next:
            self._rows = hub_rows(self._name, self._revision, skip=shard * self._per_shard)
        self._next = -1  # until the shard is read: after an error the stream's position is unknown
        for number in range(self._per_shard):
            row = next(self._rows, None)
            if row is None:
                return
            where = f"{self._name}, row {shard * self._per_shard + number}"
            if self.reading.columns is None:
                self.reading = self._chosen(where, row)
            found = document_of(row, self.reading, where)
            if not isinstance(found, Broken):
                yield found
            elif self.reading.broken == "stop":
                raise UsageError(found.message, hint="set column: NAME in the domain, or broken_lines: skip")
            else:
                yield ""  # stands in for the broken row: shards are found by the number of documents before them
        self._next = shard + 1

    def _chosen(self, where: str, row: Any) -> Reading:
        chosen = choose_reading([(where, row)], self.reading)
        if chosen.kind != self.kind:
            raise UsageError(
                f"{where}: column '{chosen.column}' holds conversations, which a hub dataset's domain must say",
                hint=f"set column: {chosen.column} in the domain",
            )
        return chosen

    def key(self, shard: int) -> str:
        """See :class:`Corpus`."""
        return repr((self._name, self._revision, self._key, self._per_shard, shard))

    def contents(self) -> dict[str, str]:
        """See :class:`Corpus`."""
        return {self._name: f"{self._revision or 'latest'}, {self._per_shard} documents a shard"}

    def full(self, documents: int) -> bool:
        """See :class:`Corpus`."""
        return documents == self._per_shard


def open_corpus(
    texts: list[str], reading: Reading, revision: str | None, size: int, domain: str, named: Format | None = None
) -> Corpus:
    """The corpus of local files, or of the one hub dataset that ``texts`` names.

    Args:
        texts: files, globs, folders that ``datasets`` saved, or a dataset.
        reading: how documents are read from them.
        revision: of a hub dataset.
        size: bytes per shard.
        domain: what errors call it.
        named: the format of all files; ``None``: by their endings.

    Raises:
        UsageError: there is no such file, a dataset is not alone in its domain, or a revision is given for files.
    """
    from upcycle.text.hub_dataset import is_dataset

    hub = [name for name in texts if is_dataset(name)]
    if not hub:
        if revision:
            raise UsageError(f"domain '{domain}': only hub datasets have a revision, and {texts[0]} is a file")
        return LocalCorpus(texts, reading, size, named)
    if len(texts) > 1:
        raise UsageError(
            f"domain '{domain}': the hub dataset {hub[0]} must be alone in its domain",
            hint="make one domain for each dataset",
        )
    return HubCorpus(hub[0], reading, revision, size)


def file_fingerprint(path: Path) -> str:
    """A hash, 16 hexadecimal digits, of a file's size and content: up to 1 MiB all of it, else 64 evenly spread samples."""
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


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _bundled(pieces: list[FilePiece], size: int) -> list[list[FilePiece]]:
    """Consecutive pieces in shards of up to ``size`` bytes, or of one larger piece."""
    shards: list[list[FilePiece]] = []
    weight = size
    for piece in pieces:
        if weight + piece.size > size:
            shards.append([])
            weight = 0
        shards[-1].append(piece)
        weight += piece.size
    return shards
