"""The rows of one domain: an epoch has every document once, in an order of its own, within little memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from upcycle.errors import UsageError
from upcycle.trainers.data.corpus import Corpus
from upcycle.trainers.data.domain_rows import SHARDS_TOGETHER, Cursor, DomainRows, HeldOut
from upcycle.trainers.data.token_shards import Encoder, TokenCache, document_hash

SHARDS, PER_SHARD = 2 * SHARDS_TOGETHER + 3, 7
LENGTH = 24
NOTHING = HeldOut(0.0, np.empty(0, np.uint64))


class Numbers(Corpus):
    """Every document is one letter of its own, several times."""

    def __init__(self, stream: bool = False) -> None:
        super().__init__()
        self.shards = None if stream else SHARDS

    def documents(self, shard: int) -> Iterator[str]:
        for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
            if number < SHARDS * PER_SHARD - 2 * (self.shards is None):
                yield chr(1000 + number) * (3 + 5 * number % 31)

    def key(self, shard: int) -> str:
        return repr((self.shards, shard))

    def contents(self) -> dict[str, str]:
        return {}

    def full(self, documents: int) -> bool:
        return documents == PER_SHARD


Opened = Callable[..., DomainRows]


@pytest.fixture
def opened(tmp_path: Path, letters: Any) -> Opened:
    def make(corpus: Corpus, held_out: HeldOut = NOTHING, **options: Any) -> DomainRows:
        cache = TokenCache(tmp_path, Encoder(letters, end_of_text=False))
        options = {"length": LENGTH, "packing": "best_fit", "padding": 0, "seed": 5, **options}
        return DomainRows("x", corpus, cache, held_out, **options)

    return make


def epoch(domain: DomainRows, number: int) -> list[list[int]]:
    """The ids of its rows."""
    cursor, found = domain.skip(Cursor(number, 0, 0), 0), []
    while cursor.epoch == number:
        found.append(domain.row(cursor)[0].tolist())
        cursor = domain.skip(cursor, 1)
    return found


def counts(corpus: Corpus, shards: int = SHARDS) -> Counter[int]:
    return Counter(ord(letter) for shard in range(shards) for text in corpus.documents(shard) for letter in text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("packing", ["best_fit", "concatenate", "alone"])
def test_an_epoch_has_every_token_once(opened: Opened, stream: bool, packing: str) -> None:
    domain = opened(Numbers(stream), packing=packing)
    rows = [epoch(domain, number) for number in range(3)]
    for found in rows:
        seen = Counter(token for row in found for token in row if token)
        assert seen == counts(domain.corpus)
    assert rows[0] != rows[1] != rows[2], "epochs are shuffled anew"
    assert rows[0] != epoch(opened(Numbers(stream), packing=packing, seed=6), 0)


def test_documents_are_shuffled_over_the_shards_of_a_block(opened: Opened) -> None:
    domain = opened(Numbers())
    first = epoch(domain, 0)[:20]
    shards = {(token - 1000) // PER_SHARD for row in first for token in row if token}
    assert len(shards) == SHARDS_TOGETHER
    assert shards != set(range(SHARDS_TOGETHER)), "the shards of a block are not neighbours"


def test_skipping_ends_at_the_cursor_that_reading_does(opened: Opened) -> None:
    domain = opened(Numbers())
    cursor = start = domain.skip(Cursor(), 0)
    for passed in range(150):
        if passed % 11 == 0:
            assert opened(Numbers()).skip(start, passed) == cursor
        cursor = domain.skip(cursor, 1)
    assert cursor.epoch > 0


def test_held_out_documents_are_in_no_row(opened: Opened) -> None:
    corpus = Numbers()
    texts = [text for shard in range(SHARDS) for text in corpus.documents(shard)]
    hashes = np.array([document_hash(text) for text in texts], np.uint64)
    held_out = HeldOut(0.3, hashes[:5])
    seen = {token for row in epoch(opened(corpus, held_out), 0) for token in row}
    for text, hashed, number in zip(texts, hashes.tolist(), range(len(texts)), strict=True):
        assert (ord(text[0]) in seen) == (hashed >= 0.3 * 2**64 and number >= 5)
    assert 10 < len(seen) < len(texts) - 10


def test_a_row_says_where_its_documents_begin(opened: Opened) -> None:
    domain = opened(Numbers())
    ids, positions, targets, *_ = domain.row(domain.skip(Cursor(), 3))
    for at in range(1, LENGTH):
        assert (positions[at] == 0) == (ids[at] != ids[at - 1])
        assert targets[at] == (ids[at] == ids[at - 1] != 0)


@pytest.mark.parametrize("fraction", [0.0, 1 - 2**-53])
def test_an_empty_domain(opened: Opened, fraction: float) -> None:
    class Nothing(Numbers):
        def documents(self, shard: int) -> Iterator[str]:
            yield from (super().documents(shard) if fraction else ["", " \n"])

    with pytest.raises(UsageError, match="domain 'x' is empty"):
        opened(Nothing(), HeldOut(fraction, np.empty(0, np.uint64))).skip(Cursor(), 0)


@pytest.mark.long
def test_memory_does_not_grow_with_the_corpus(opened: Opened) -> None:
    class Large(Numbers):
        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.shards = blocks * SHARDS_TOGETHER

        def documents(self, shard: int) -> Iterator[str]:
            for number in range(10):
                yield chr(1000 + number + shard) * 1000

    def peak(blocks: int) -> int:
        domain = opened(Large(blocks), length=500)
        tracemalloc.start()
        cursor = domain.skip(Cursor(), 0)
        while cursor.epoch == 0:
            domain.row(cursor)
            cursor = domain.skip(cursor, 40)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # Four times the text: all that may grow is the order of the shards.
    assert peak(8) < 1.25 * peak(2)
