"""Corpora of files and of a hub dataset, for which a local folder stands in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.text.reading.columns import Reading
from upcycle.text.reading.conversations import Example
from upcycle.trainers.data.corpus import HubCorpus, LocalCorpus, file_fingerprint, open_corpus

DOCUMENTS = [f"document {number}" for number in range(50)]


def test_small_files_share_a_shard_and_large_ones_take_several(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * 30 + "\n")
    (tmp_path / "7.txt").write_text(("x" * 49 + "\n") * 6)
    corpus = LocalCorpus([str(tmp_path / "*.txt")], Reading(), 100)
    found = [list(corpus.documents(shard)) for shard in range(corpus.shards or 0)]
    assert [len(shard) for shard in found] == [3, 3, 1, 1, 1]
    assert "".join(text for shard in found for text in shard) == "".join(
        path.read_text() for path in sorted(tmp_path.iterdir())
    )
    assert len({corpus.key(shard) for shard in range(5)}) == 5


def test_a_file_that_changes_while_it_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    corpus = LocalCorpus([str(path)], Reading(), 100)
    path.write_text("two")
    with pytest.raises(UsageError, match=r"a\.txt changed while it was in use"):
        list(corpus.documents(0))
    path.unlink()
    with pytest.raises(EnvironmentFault, match=r"a\.txt is gone"):
        list(corpus.documents(0))


def test_the_fingerprint_of_a_large_file_sees_its_length_and_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    content = bytearray(3 << 20)
    seen = set()
    for change in (None, 0, len(content) - 1):
        changed = bytearray(content)
        if change is not None:
            changed[change] = 1
        path.write_bytes(changed)
        seen.add(file_fingerprint(path))
    path.write_bytes(content + b"\0")
    seen.add(file_fingerprint(path))
    assert len(seen) == 4


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """``org/set`` on the hub is a folder of Parquet files; the list counts how often it was opened."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    for part, documents in enumerate((DOCUMENTS[:20], DOCUMENTS[20:])):
        parquet.write_table(
            pyarrow.table({"id": range(len(documents)), "body": documents}), tmp_path / f"set/{part}.parquet"
        )
    real, opened = datasets.load_dataset, [0]

    def load_dataset(name: str, *arguments: Any, revision: str | None = None, **options: Any) -> Any:
        opened[0] += 1
        assert options["streaming"]
        if name != "org/set" or revision not in (None, "v1"):
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return real("parquet", data_files=sorted(map(str, (tmp_path / "set").glob("*"))), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return opened


def test_a_hub_dataset_is_streamed_in_shards(hub: list[int]) -> None:
    corpus = open_corpus(["org/set"], Reading(), "v1", 16 * 4096, "x")
    assert isinstance(corpus, HubCorpus)
    assert corpus.shards is None
    shards = [list(corpus.documents(shard)) for shard in range(4)]
    assert hub == [1], "read on, not opened again"
    assert [text for shard in shards for text in shard] == DOCUMENTS
    assert [corpus.full(len(shard)) for shard in shards] == [True, True, True, False]
    again = HubCorpus("org/set", Reading("body"), None, 16 * 4096)
    assert list(again.documents(2)) == DOCUMENTS[32:48], "skipped to"


@pytest.mark.parametrize(
    ("texts", "revision", "error", "message"),
    [
        (["org/set", "org/other"], None, UsageError, "domain 'x': the hub dataset org/set must be alone"),
        (["demo"], "v1", UsageError, "only hub datasets have a revision, and demo is a file"),
        (["org/none"], None, EnvironmentFault, "dataset org/none cannot be read: Dataset 'org/none' doesn't exist"),
    ],
)
def test_texts_that_cannot_be_opened_are_refused(
    hub: list[int], texts: list[str], revision: str | None, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        list(open_corpus(texts, Reading(), revision, 1000, "x").documents(0))


def test_a_hub_dataset_of_conversations_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rows hold is known before any is read: a run may continue from its cache without a network."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": talk, "prompt": "Hi", "answer": "Hello", "bad": "Oh"}] * 3
    monkeypatch.setattr("upcycle.text.hub_dataset.hub_rows", lambda *_, **__: iter(rows))
    for reading, kind in (
        (Reading("messages"), "chat"),
        (Reading(prompt=("prompt",), response="answer"), "pairs"),
        (Reading(prompt=("prompt",), response="answer", rejected="bad"), "preferences"),
    ):
        corpus = HubCorpus("org/set", reading, None, 16 * 4096)
        assert corpus.kind == kind
        found = list(corpus.documents(0))
        assert [each.messages for each in found if isinstance(each, Example)] == [tuple(talk)] * 3
    with pytest.raises(UsageError, match="org/set, row 0: column 'messages' holds conversations") as caught:
        list(HubCorpus("org/set", Reading(), None, 16 * 4096).documents(0))
    assert caught.value.hint == "set column: messages in the domain"


def test_a_hub_dataset_without_the_column(hub: list[int]) -> None:
    with pytest.raises(UsageError, match=r"org/set, row 0: no column 'text'; the columns are body, id"):
        list(HubCorpus("org/set", Reading("text"), None, 1000).documents(0))
