"""Tokenised text on disk: made once, whole or not there, in the caller's words when it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_limits import files_of_at_most

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.trainers.data import token_shards
from upcycle.trainers.data.corpus import Corpus
from upcycle.trainers.data.token_shards import Encoder, TokenCache, document_hash

DOCUMENTS = ["one", " \n", "two three", "", "four"]


class Listed(Corpus):
    """Documents in memory, with a count of how often they were read."""

    shards = 1

    def __init__(self, documents: list[str]) -> None:
        super().__init__()
        self.read, self._documents = 0, documents

    def documents(self, shard: int) -> Iterator[str]:
        self.read += 1
        yield from self._documents

    def key(self, shard: int) -> str:
        return repr((self._documents, shard))

    def contents(self) -> dict[str, str]:
        return {}


def test_ids_lengths_and_hashes(tmp_path: Path, letters: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_shards, "_TOGETHER", 4)
    shard = TokenCache(tmp_path, Encoder(letters)).shard(Listed(DOCUMENTS), 0)
    texts = ["one", "two three", "four"]
    assert shard.tokens.tolist() == [token for text in texts for token in [*map(ord, text), 1]]
    assert shard.lengths.tolist() == [4, 10, 5]
    assert shard.hashes.tolist() == [document_hash(text) for text in texts]
    assert isinstance(shard.tokens, np.memmap), "mapped, not read"


def test_threads_that_ask_at_once_share_one_tokenisation(tmp_path: Path, letters: Any) -> None:
    corpora = [Listed(DOCUMENTS) for _ in range(6)]
    work = [threading.Thread(target=TokenCache(tmp_path, Encoder(letters)).shard, args=(c, 0)) for c in corpora]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert sum(corpus.read for corpus in corpora) == 1


@pytest.mark.parametrize("damage", ["index", "tokens", "short", "garbage"])
def test_a_damaged_shard_is_made_again(tmp_path: Path, letters: Any, damage: str) -> None:
    cache, corpus = TokenCache(tmp_path, Encoder(letters)), Listed(DOCUMENTS)
    expected = cache.shard(corpus, 0).tokens.tolist()
    (index,), (tokens,) = tmp_path.rglob("*.safetensors"), tmp_path.rglob("*.tokens")
    if damage == "index":
        index.unlink()
    elif damage == "tokens":
        tokens.unlink()
    elif damage == "short":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    else:
        index.write_bytes(b"no")
    assert cache.shard(corpus, 0).tokens.tolist() == expected
    assert corpus.read == 2


def test_a_reader_that_fails_leaves_no_shard(tmp_path: Path, letters: Any) -> None:
    class Broken(Listed):
        def documents(self, shard: int) -> Iterator[str]:
            yield "x" * token_shards._TOGETHER
            raise UsageError("line 7 is not JSON")

    with pytest.raises(UsageError, match="line 7"):
        TokenCache(tmp_path, Encoder(letters)).shard(Broken([]), 0)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".lock"}


def test_a_cache_that_cannot_be_written(tmp_path: Path, letters: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match=r"tokenised text cannot be kept in .*file: ") as caught:
        TokenCache(tmp_path / "file", Encoder(letters)).shard(Listed(DOCUMENTS), 0)
    assert "cache: FOLDER" in str(caught.value.hint)


@pytest.mark.parametrize(
    "room", [4000, 12000]
)  # less than tokens take, or than their index: 8 and 16 bytes per document
def test_a_disk_that_fills(tmp_path: Path, letters: Any, room: int) -> None:
    cache, corpus = TokenCache(tmp_path, Encoder(letters)), Listed(["a"] * 1000)
    with pytest.raises(EnvironmentFault, match=r"cannot be kept in .*: File too large"), files_of_at_most(room):
        cache.shard(corpus, 0)
    left = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {".lock", ".tokens"}, "what is unfinished does not fill the disk"
    assert len(cache.shard(corpus, 0).lengths) == 1000


def test_special_tokens(letters: Any, pico: Callable[[str], Path]) -> None:
    assert Encoder(letters).encode(["a"]) == [[97, 1]]
    assert Encoder(letters, end_of_text=False).encode(["a"]) == [[97]]
    letters.eos_token_id = None
    with pytest.raises(UsageError, match="no end-of-text token"):
        Encoder(letters)
    demo = load_tokenizer(pico("llama"))
    (row,) = Encoder(demo).encode(["hello"])
    assert row == [*demo("hello", add_special_tokens=False)["input_ids"], demo.eos_token_id]


def test_a_beginning_is_put_where_the_tokenizer_puts_one(letters: Any) -> None:
    class WithBeginning(type(letters)):  # type: ignore[misc]
        bos_token_id = 2

        def __call__(self, texts: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
            found = super().__call__(texts)
            if add_special_tokens:
                found["input_ids"] = [2, *found["input_ids"]]
            return found

    assert Encoder(WithBeginning()).encode(["a"]) == [[2, 97, 1]]
    assert Encoder(WithBeginning()).fingerprint != Encoder(letters).fingerprint
