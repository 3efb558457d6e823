"""The endless rows of one domain, epoch after epoch, each found by its position. Rows of L tokens, N documents."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upcycle.errors import UpcycleError, UsageError
from upcycle.trainers.data.corpus import Corpus
from upcycle.trainers.data.keyed_random import permutation
from upcycle.trainers.data.packing import Int64, PackedRow, Rows, layout, pack_documents
from upcycle.trainers.data.token_codes import decoded
from upcycle.trainers.data.token_shards import Hashes, TokenCache, TokenShard
from upcycle.trainers.data.too_long import fitted
from upcycle.trainers.pictures.row_pictures import PlacedPicture
from upcycle.trainers.recipe.data_recipe import Packing, TooLong

SHARDS_TOGETHER = 8  # shards in a block, whose documents are shuffled together


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out from training.

    Held out are those whose hash falls into the first ``fraction`` of all hashes, and those in ``hashes``, but none in ``kept``. With
    ``ends``, the documents are divided instead: of each, that share of its tokens at its end is held out.
    """

    fraction: float
    hashes: Hashes
    kept: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    ends: float = 0.0

    def chosen(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Which documents are held out, bool ``[N]``, from their hashes ``[N]``."""
        limit = np.uint64(int(self.fraction * 2**64))
        return np.asarray(((hashes < limit) | np.isin(hashes, self.hashes)) & ~np.isin(hashes, self.kept))

    def parts(self, shard: TokenShard, held_out: bool) -> tuple[Int64, Int64, Int64]:
        """What of a shard is held out, or is trained on: its documents' numbers, first tokens and lengths, ``[N]`` each."""
        begin, lengths = np.cumsum(shard.lengths) - shard.lengths, shard.lengths
        if self.ends:
            least = np.minimum(2, lengths)  # a token, and one that predicts it
            behind = np.maximum(np.ceil(lengths * self.ends).astype(np.int64), least)
            begin, lengths = (begin + lengths - behind, behind) if held_out else (begin, lengths - behind)
            of_shard = np.flatnonzero(lengths)
        else:
            of_shard = np.flatnonzero(self.chosen(shard.hashes) == held_out)
        return of_shard, begin[of_shard], lengths[of_shard]

    @property
    def fingerprint(self) -> str:
        """A text that differs wherever different documents are held out."""
        kept = f"/{np.sort(self.kept).tolist()}" if len(self.kept) else ""
        ends = f"/ends {self.ends!r}" if self.ends else ""
        return f"{self.fraction!r}/{hashlib.sha256(np.sort(self.hashes).data).hexdigest()[:16]}{kept}{ends}"


@dataclass(frozen=True, order=True)
class Cursor:
    """A position: the number of the next row in a block of an epoch."""

    epoch: int = 0
    block: int = 0
    row: int = 0


@dataclass(frozen=True)
class _Block:
    shards: list[TokenShard]
    shard: NDArray[np.int64]  # [N], each document's
    begin: NDArray[np.int64]  # [N], its first token in the shard
    rows: Rows
    order: NDArray[np.int64]  # [R]


class DomainRows:
    """Rows in an order that depends on the seed alone: shards are shuffled, then the documents and rows of every block of them."""

    def __init__(
        self,
        name: str,
        corpus: Corpus,
        cache: TokenCache,
        held_out: HeldOut,
        *,
        length: int,
        packing: Packing,
        padding: int,
        seed: int,
        turn: int = 0,
        too_long: TooLong = "split",
    ) -> None:
        """``turn``: the shard of a block at which tokenising begins. Ranks begin at different ones, to share the work."""
        self.name, self.corpus = name, corpus
        self._cache, self._held_out = cache, held_out
        self._length, self._packing, self._padding, self._seed, self._turn = length, packing, padding, seed, turn
        self._too_long = too_long
        self._blocks: dict[tuple[int, int], _Block | None] = {}
        self._ahead: threading.Thread | None = None

    def skip(self, cursor: Cursor, rows: int) -> Cursor:
        """The position ``rows`` rows after ``cursor``.

        Raises:
            UsageError: the domain holds no document to train on.
        """
        epoch, number, row = cursor.epoch, cursor.block, cursor.row + rows
        found = number > 0  # whether this epoch has any row
        while True:
            block = self._block(epoch, number)
            if block is None:
                if not found:
                    raise UsageError(
                        f"domain '{self.name}' is empty: it has no document to train on",
                        hint="check its text; if it has few documents, lower validation.fraction",
                    )
                epoch, number, found = epoch + 1, 0, False
            elif row < len(block.order):
                return Cursor(epoch, number, row)
            else:
                row -= len(block.order)
                found = found or len(block.order) > 0
                number += 1

    def row(self, cursor: Cursor) -> PackedRow:
        """The row at a position that :meth:`skip` returned."""
        block = self._block(cursor.epoch, cursor.block)
        assert block is not None
        return read_row(
            block.shards,
            block.shard,
            block.begin,
            block.rows,
            int(block.order[cursor.row]),
            self._length,
            self._padding,
        )

    def digest(self, cursor: Cursor) -> str:
        """A digest of the position's block: blocks with equal digests have equal rows."""
        block = self._block(cursor.epoch, cursor.block)
        shards = block.shards if block else []
        return " ".join([self._held_out.fingerprint, *(shard.digest for shard in shards)])

    def _block(self, epoch: int, number: int) -> _Block | None:
        if (epoch, number) not in self._blocks:
            while len(self._blocks) > 1:  # two are kept: a batch may begin in one block and end in the next
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[epoch, number] = self._load(epoch, number)
            self._tokenise_ahead(epoch, number)
        return self._blocks[epoch, number]

    def _shards_of(self, epoch: int, number: int) -> Iterator[TokenShard]:
        places = range(number * SHARDS_TOGETHER, (number + 1) * SHARDS_TOGETHER)
        if self.corpus.shards is not None:
            order = permutation(self.corpus.shards, self._seed, self.name, epoch, "shards")
            block = order[places.start : places.stop].tolist()
            first = self._turn % max(1, len(block))
            made = {at: self._cache.shard(self.corpus, at) for at in [*block[first:], *block[:first]]}
            yield from (made[at] for at in block)
            return
        if number and self._cache.shard(self.corpus, places.start - 1).last:
            return
        for at in places:
            shard = self._cache.shard(self.corpus, at)
            yield shard
            if shard.last:
                return

    def _load(self, epoch: int, number: int) -> _Block | None:
        shards = list(self._shards_of(epoch, number))
        if not shards:
            return None
        key = (self._seed, self.name, epoch, number)
        parts = [self._held_out.parts(shard, held_out=False) for shard in shards]
        shard = np.repeat(np.arange(len(shards)), [len(documents) for documents, _, _ in parts])
        begin = np.concatenate([begin for _, begin, _ in parts])
        lengths = np.concatenate([lengths for _, _, lengths in parts])
        fit = fitted(shards, shard, begin, lengths, self._length, self._too_long)
        shard, begin, lengths = shard[fit.kept], fit.begin, fit.length
        order = permutation(len(lengths), *key, "documents")
        rows = pack_documents(lengths[order], self._length, self._packing)
        return _Block(shards, shard[order], begin[order], rows, permutation(len(rows), *key, "rows"))

    def _tokenise_ahead(self, epoch: int, number: int) -> None:
        """Tokenise the next block in a thread. Errors are ignored here: they are raised when the block is needed."""
        if self._ahead and self._ahead.is_alive():
            return

        def work() -> None:
            with suppress(UpcycleError):
                for _ in self._shards_of(epoch, number + 1):
                    pass

        if self.corpus.shards is None or (number + 1) * SHARDS_TOGETHER < self.corpus.shards:
            self._ahead = threading.Thread(target=work, daemon=True, name=f"tokenise {self.name}")
            self._ahead.start()


def read_row(
    shards: list[TokenShard], shard: Any, begin: Any, rows: Rows, number: int, length: int, padding: int
) -> PackedRow:
    """Ids, positions, targets and tokens that are no padding, of one packed row, ``[L]`` each.

    Args:
        shards: where the documents' tokens are.
        shard: ``[N]``, the index of each document's shard.
        begin: ``[N]``, where its tokens begin there.
        rows: the packing.
        number: of the row.
        length: L.
        padding: the id that fills up the row.
    """
    parts = slice(rows.first[number], rows.first[number + 1])
    documents, starts, lengths = rows.document[parts], rows.start[parts], rows.length[parts]
    ids = np.full(length, padding, np.int64)
    at = 0
    pictures: list[PlacedPicture] = []
    for document, start, size in zip(documents, begin[documents] + starts, lengths, strict=True):
        held = shards[shard[document]]
        ids[at : at + size] = held.tokens[start : start + size]
        if held.pictures:
            (own,) = held.pictures_at(np.array([start]))
            pictures += [PlacedPicture(picture, at, at + int(size)) for picture in own]
        at += size
    ids, learned, begins = decoded(ids)
    if begins.any():
        starts = np.union1d(np.cumsum(lengths) - lengths, np.flatnonzero(begins))
        lengths = np.diff(np.append(starts, at))
    positions, targets = layout(lengths, length)
    return PackedRow(ids, positions, targets & learned, np.arange(length) < at, tuple(pictures))
