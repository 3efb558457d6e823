"""The documents of one domain as a sequence of shards, each of which can be read alone: local files or a hub dataset."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upcycle.errors import UsageError
from upcycle.trainers.documents import Piece, column_text, find_column, find_pieces

_WHOLE = 1 << 20  # bytes; of larger files samples are hashed
_SAMPLES, _SAMPLE = 64, 1 << 14
_BYTES_PER_DOCUMENT = 4096  # of hub datasets: how many documents a shard takes is fixed, so that it can be found again


class Corpus(ABC):
    """Documents in shards. ``shards`` is their number, or ``None`` where only the end of a stream will tell."""

    shards: int | None

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

    def full(self, documents: int) -> bool:
        """Whether a shard of that many documents is not the last one of a stream."""
        return True


class LocalCorpus(Corpus):
    """Files; shards of about ``size`` bytes, smaller files together in one."""

    def __init__(self, texts: list[str], column: str | None, separator: str | None, size: int) -> None:
        """Finds the files and reads a sample of each.

        Raises:
            UsageError: no such file.
        """
        super().__init__()
        self._column, self._separator = column, separator
        self._shards = _bundled(find_pieces(texts, size), size)
        self.shards = len(self._shards)
        paths = dict.fromkeys(piece.path for shard in self._shards for piece in shard)
        self._prints = {path: file_fingerprint(path) for path in paths}

    def documents(self, shard: int) -> Iterator[str]:
        """See :class:`Corpus`. A file that is not what it was when it was found is not read."""
        for piece in self._shards[shard]:
            if piece.path.exists() and file_fingerprint(piece.path) != self._prints[piece.path]:
                raise UsageError(
                    f"the data file {piece.path} changed while it was in use",
                    hint="put back what it was, then continue",
                )
            yield from piece.documents(self._column, self._separator)

    def key(self, shard: int) -> str:
        """Where and when, too: a sample alone does not see every change."""
        pieces = [
            (str(p.path.resolve()), _changed(p.path), self._prints[p.path], p.start, p.stop)
            for p in self._shards[shard]
        ]
        return repr((self._column, self._separator, pieces))

    def contents(self) -> dict[str, str]:
        """See :class:`Corpus`."""
        return {str(path): fingerprint for path, fingerprint in self._prints.items()}


class HubCorpus(Corpus):
    """A hub dataset, streamed: shards are its documents in order, a fixed number in each."""

    shards = None

    def __init__(self, name: str, column: str | None, revision: str | None, size: int) -> None:
        super().__init__()
        self._name, self._column, self._revision = name, column, revision
        self._found = column
        self._per_shard = max(16, size // _BYTES_PER_DOCUMENT)
        self._rows: Iterator[Any] = iter(())
        self._next = -1  # the shard that ``_rows`` is at

    def documents(self, shard: int) -> Iterator[str]:
        """See :class:`Corpus`. Shards in order are read on; others are skipped to."""
        from upcycle.hub_dataset import hub_rows

        if shard != self._next:
            self._rows = hub_rows(self._name, self._revision, skip=shard * self._per_shard)
        self._next = -1  # an error on the way leaves it nowhere
        for number in range(self._per_shard):
            row = next(self._rows, None)
            if row is None:
                return
            where = f"{self._name}, row {shard * self._per_shard + number}"
            if self._found is None:
                self._found = find_column(row, None, where)
            yield column_text(row, self._found, where)
        self._next = shard + 1

    def key(self, shard: int) -> str:
        """See :class:`Corpus`."""
        return repr((self._name, self._revision, self._column, self._per_shard, shard))

    def contents(self) -> dict[str, str]:
        """See :class:`Corpus`."""
        return {self._name: f"{self._revision or 'latest'}, {self._per_shard} documents a shard"}

    def full(self, documents: int) -> bool:
        """See :class:`Corpus`."""
        return documents == self._per_shard


def open_corpus(
    texts: list[str], column: str | None, separator: str | None, revision: str | None, size: int, domain: str
) -> Corpus:
    """Files, or the one hub dataset that ``texts`` names.

    Raises:
        UsageError: no such file, several datasets in one domain, or a revision of files.
    """
    from upcycle.hub_dataset import is_dataset

    hub = [name for name in texts if is_dataset(name)]
    if not hub:
        if revision:
            raise UsageError(f"domain '{domain}': a revision is for hub datasets, and {texts[0]} is a file")
        return LocalCorpus(texts, column, separator, size)
    if len(texts) > 1:
        raise UsageError(
            f"domain '{domain}': the hub dataset {hub[0]} is not alone", hint="one domain for each dataset"
        )
    return HubCorpus(hub[0], column, revision, size)


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


def _bundled(pieces: list[Piece], size: int) -> list[list[Piece]]:
    shards: list[list[Piece]] = []
    weight = size
    for piece in pieces:
        if weight + piece.size > size:
            shards.append([])
            weight = 0
        shards[-1].append(piece)
        weight += piece.size
    return shards
