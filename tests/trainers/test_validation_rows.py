"""Validation rows: the held-out documents in order, no more than asked for, the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from upcycle.errors import UsageError
from upcycle.trainers.corpus import LocalCorpus
from upcycle.trainers.token_shards import Encoder, TokenCache, document_hash
from upcycle.trainers.validation_rows import held_out_hashes, validation_rows

TEXTS = [f"document {number} " + chr(200 + number) * (number % 9) for number in range(80)]


@pytest.fixture
def corpus(tmp_path: Path) -> LocalCorpus:
    (tmp_path / "a.txt").write_text("#".join(text + "\n" for text in TEXTS))
    return LocalCorpus([str(tmp_path / "a.txt")], None, "\n#", 10**6)


@pytest.fixture
def cache(tmp_path: Path, letters: Any) -> TokenCache:
    return TokenCache(tmp_path / "cache", Encoder(letters))


@pytest.mark.parametrize("tokens", [16, 100, 10**6])
def test_held_out_documents_in_order(corpus: LocalCorpus, cache: TokenCache, tokens: int) -> None:
    rows = validation_rows("x", corpus, cache, 0.25, tokens, 32)
    documents = list(corpus.documents(0))
    held_out = [text for text in documents if document_hash(text) < 2**62]
    assert 5 < len(held_out) < 40
    expected = [token for text in held_out for token in [*map(ord, text), 1]][:tokens]
    found = np.concatenate([ids for ids, *_ in rows])
    assert found[: len(expected)].tolist() == expected
    assert not found[len(expected) :].any()
    assert len(found) - len(expected) < 32


def test_all_of_a_corpus_of_its_own(corpus: LocalCorpus, cache: TokenCache) -> None:
    rows = validation_rows("x", corpus, cache, 1.0, 10**6, 32)
    assert sum(int((positions == 0).sum()) for _, positions, _ in rows) >= len(TEXTS)
    assert len(held_out_hashes(corpus, cache)) == len(TEXTS)
    assert len(held_out_hashes(None, cache)) == 0


def test_too_few_documents(tmp_path: Path, cache: TokenCache) -> None:
    (tmp_path / "book.txt").write_text("one long book")
    book = LocalCorpus([str(tmp_path / "book.txt")], None, None, 10**6)
    with pytest.raises(
        UsageError, match=r"domain 'x' has 1 documents, and none falls into the held-out fraction 0\.02"
    ) as caught:
        validation_rows("x", book, cache, 0.02, 1000, 32)
    assert "separator" in str(caught.value.hint)
