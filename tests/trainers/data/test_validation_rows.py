"""Validation rows: the held-out documents in order, no more than asked for, the same every time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from upcycle.errors import UsageError
from upcycle.text.reading.columns import Reading
from upcycle.trainers.data.corpus import LocalCorpus
from upcycle.trainers.data.domain_rows import Cursor, DomainRows, HeldOut
from upcycle.trainers.data.token_shards import Encoder, TokenCache, document_hash
from upcycle.trainers.data.validation_rows import held_out_documents, held_out_hashes, validation_rows

TEXTS = [f"document {number} " + chr(200 + number) * (number % 9) for number in range(80)]


@pytest.fixture
def corpus(tmp_path: Path) -> LocalCorpus:
    (tmp_path / "a.txt").write_text("#".join(text + "\n" for text in TEXTS))
    return LocalCorpus([str(tmp_path / "a.txt")], Reading(separator="\n#"), 10**6)


@pytest.fixture
def cache(tmp_path: Path, letters: Any) -> TokenCache:
    return TokenCache(tmp_path / "cache", Encoder(letters))


@pytest.mark.parametrize("tokens", [16, 100, 10**6])
def test_held_out_documents_in_order(corpus: LocalCorpus, cache: TokenCache, tokens: int) -> None:
    rows = validation_rows("x", corpus, cache, HeldOut(0.25, np.empty(0, np.uint64)), tokens, 32)
    documents = list(corpus.documents(0))
    held_out = [text for text in documents if document_hash(text) < 2**62]
    assert 5 < len(held_out) < 40
    expected = [token for text in held_out for token in [*map(ord, text), 1]][:tokens]
    found = np.concatenate([ids for ids, *_ in rows])
    assert found[: len(expected)].tolist() == expected
    assert not found[len(expected) :].any()
    assert len(found) - len(expected) < 32


def test_documents_that_are_alone_in_training_are_alone_here(corpus: LocalCorpus, cache: TokenCache) -> None:
    rows = validation_rows("x", corpus, cache, None, 10**6, 32, packing="alone")
    assert len(rows) == len(TEXTS)
    assert {int((positions == 0).sum()) for _, positions, *_ in rows} == {1}


def test_a_validation_corpus_of_its_own_is_read_as_a_whole(corpus: LocalCorpus, cache: TokenCache) -> None:
    rows = validation_rows("x", corpus, cache, None, 10**6, 32)
    assert sum(int((positions == 0).sum()) for _, positions, *_ in rows) >= len(TEXTS)
    assert len(held_out_hashes(corpus, cache)) == len(TEXTS)
    assert len(held_out_hashes(None, cache)) == 0


@pytest.mark.parametrize("fraction", [0.02, 0.25])
def test_of_one_text_the_end_is_held_out(tmp_path: Path, cache: TokenCache, fraction: float) -> None:
    text = "".join(map(chr, range(300, 700)))
    (tmp_path / "book.txt").write_text(text)
    book = LocalCorpus([str(tmp_path / "book.txt")], Reading(), 10**6)
    found = held_out_documents("x", book, None, cache, fraction)
    ids = [*map(ord, text), 1]
    behind = math.ceil(len(ids) * fraction)
    validated = np.concatenate([row for row, *_ in validation_rows("x", book, cache, found, 10**6, 32)])
    assert validated[:behind].tolist() == ids[-behind:]
    assert not validated[behind:].any()
    rows = DomainRows("x", book, cache, found, length=32, packing="concatenate", padding=0, seed=0)
    cursor, trained = rows.skip(Cursor(), 0), set()
    while cursor.epoch == 0:
        trained |= set(rows.row(cursor)[0].tolist())
        cursor = rows.skip(cursor, 1)
    assert trained - {0} == set(ids[:-behind])
    assert found.fingerprint != HeldOut(0.0, np.empty(0, np.uint64)).fingerprint
    assert not held_out_documents("x", book, None, cache, 0.0).ends


def test_one_example_cannot_be_divided(tmp_path: Path, cache: TokenCache) -> None:
    (tmp_path / "one.txt").write_text("a pair")
    pair = LocalCorpus([str(tmp_path / "one.txt")], Reading(), 10**6)
    pair.reading = replace(pair.reading, kind="pairs")
    with pytest.raises(UsageError, match=r"domain 'x' is one example") as caught:
        held_out_documents("x", pair, None, cache, 0.02)
    assert "files to validate on" in str(caught.value.hint)


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 80])
def test_some_documents_are_held_out_and_some_trained_on(
    tmp_path: Path, cache: TokenCache, fraction: float, count: int
) -> None:
    (tmp_path / "a.txt").write_text("#".join(text + "\n" for text in TEXTS[:count]))
    corpus = LocalCorpus([str(tmp_path / "a.txt")], Reading(separator="\n#"), 10**6)
    hashes = held_out_hashes(corpus, cache)
    found = held_out_documents("x", corpus, None, cache, fraction)
    chosen = found.chosen(hashes)
    assert chosen.any()
    assert not chosen.all()
    plain = HeldOut(fraction, np.empty(0, np.uint64))
    if 0 < plain.chosen(hashes).sum() < count:
        assert (chosen == plain.chosen(hashes)).all()
        assert found.fingerprint == plain.fingerprint
    assert validation_rows("x", corpus, cache, found, 10**6, 32)
