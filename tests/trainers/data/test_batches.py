"""The stream as a whole: every document once an epoch, the same rows on any number of ranks, continued bit for bit."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.recipe.validated import validated
from upcycle.trainers.data.batches import TokenStream, open_stream, open_validation
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.recipe.data_recipe import DataRecipe

LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer(pico: Callable[[str], Path]) -> Any:
    return load_tokenizer(pico("llama"))


def write(path: Path, name: str, documents: int, words: int = 9) -> str:
    """Write a .jsonl file whose documents can be told apart by their numbers."""
    rows = [
        {"text": " ".join(f"{name} {number}.{word}" for word in range(1 + number % words))}
        for number in range(documents)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., DataRecipe]:
    files = {name: write(tmp_path / f"{name}.jsonl", name, 150) for name in ("a", "b")}

    def make(**changes: Any) -> DataRecipe:
        domains = {"a": {"text": files["a"], "weight": 0.75}, "b": {"text": files["b"], "weight": 0.25}}
        content = {"domains": domains, "shuffle": "8KB", "cache": str(tmp_path / "cache"), **changes}
        return validated(DataRecipe, {"validation": {"fraction": 0.1}, **content}, "data")

    return make


def take(stream: TokenStream, calls: int) -> list[PackedBatch]:
    return [stream.next_batch() for _ in range(calls)]


def rows_of(batches: list[PackedBatch]) -> torch.Tensor:
    return torch.cat([torch.stack([batch.ids, batch.positions, batch.mask.long()], 1) for batch in batches])


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_any_number_of_ranks_sees_the_same_global_batches(
    recipe: Callable[..., DataRecipe], tokenizer: Any, packing: str
) -> None:
    data = recipe(packing=packing)
    alone = rows_of(take(open_stream(data, tokenizer, length=LENGTH, micro_batch=8, rank=0, world_size=1, seed=3), 12))
    for world, micro in [(2, 4), (4, 1)]:
        streams = [
            open_stream(data, tokenizer, length=LENGTH, micro_batch=micro, rank=r, world_size=world, seed=3)
            for r in range(world)
        ]
        calls = 12 * 8 // (world * micro)
        together = [batch for _ in range(calls) for batch in [stream.next_batch() for stream in streams]]
        assert rows_of(together).equal(alone), f"{world} ranks"
        assert all(stream.state() == streams[0].state() for stream in streams)


@pytest.mark.parametrize("calls", [0, 1, 7, 40])
def test_a_restored_stream_goes_on_bit_for_bit(recipe: Callable[..., DataRecipe], tokenizer: Any, calls: int) -> None:
    data = recipe()
    stream = open_stream(data, tokenizer, length=LENGTH, micro_batch=4, rank=0, world_size=1, seed=3)
    take(stream, calls)
    state = json.loads(json.dumps(stream.state()))
    expected = rows_of(take(stream, 20))
    for world in (1, 2):
        again = [
            open_stream(data, tokenizer, length=LENGTH, micro_batch=4 // world, rank=r, world_size=world, seed=3)
            for r in range(world)
        ]
        for other in again:
            other.restore(state)
        rows = [batch for _ in range(20) for batch in [other.next_batch() for other in again]]
        assert rows_of(rows).equal(expected)
        assert again[0].state() == stream.state()


def test_validation_and_training_share_no_document(recipe: Callable[..., DataRecipe], tokenizer: Any) -> None:
    data = recipe()
    stream = open_stream(data, tokenizer, length=LENGTH, micro_batch=4, rank=0, world_size=1, seed=3)
    trained: Counter[str] = Counter()
    for batch in take(stream, 200):
        trained.update(documents(batch, tokenizer))
    held_out = Counter(
        text
        for batches in open_validation(data, tokenizer, length=256).values()
        for batch in batches
        for text in documents(batch, tokenizer)
    )
    assert len(held_out) > 10
    assert not trained.keys() & held_out.keys()


def test_passes_count_how_often_every_document_was_read(
    recipe: Callable[..., DataRecipe], tokenizer: Any, tmp_path: Path
) -> None:
    short = {
        name: write(tmp_path / f"short-{name}.jsonl", name, size, words=2) for name, size in (("a", 90), ("b", 30))
    }
    stream = opened(recipe(domains=short), tokenizer, micro_batch=1)
    assert stream.passes == {"a": (0, False), "b": (0, False)}
    read, ends = {"a": Counter[str](), "b": Counter[str]()}, set()
    while stream.passes["b"][0] < 2:
        for text in documents(stream.next_batch(), tokenizer):
            read[text[0]][text.replace("<|endoftext|>", "")] += 1  # without the end of the row
        for name, (whole, begun) in stream.passes.items():
            assert {*read[name].values()} <= ({whole, whole + 1} if begun else {whole})
            if whole and not begun:
                ends.add((name, whole, len(read[name])))
    counts = {(name, whole): count for name, whole, count in ends}
    assert 20 < counts["b", 1] == counts["b", 2] <= 30  # all but those held out


def documents(batch: PackedBatch, tokenizer: Any) -> list[str]:
    """The fragments of a batch as text."""
    found = []
    for ids, positions in zip(batch.ids, batch.positions, strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        found += [tokenizer.decode(ids[a:b]) for a, b in pairwise(starts)]
    return [text for text in found if text.replace("<|endoftext|>", "").strip()]


def opened(data: DataRecipe, tokenizer: Any, **options: Any) -> TokenStream:
    options = {"length": LENGTH, "micro_batch": 4, "rank": 0, "world_size": 1, "seed": 3, **options}
    return open_stream(data, tokenizer, **options)


def test_validation_files_of_their_own_are_read(
    recipe: Callable[..., DataRecipe], tokenizer: Any, tmp_path: Path
) -> None:
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    (tmp_path / "v.txt").write_text("#".join([*texts[:40], "something else"]))
    domain = {"text": str(tmp_path / "a.jsonl"), "validation": str(tmp_path / "v.txt"), "separator": "#"}
    data = recipe(domains={"a": domain}, validation={"fraction": 0})
    held_out = {
        text for batch in open_validation(data, tokenizer, length=256)["a"] for text in documents(batch, tokenizer)
    }
    assert len(held_out) >= 41
    stream, trained = opened(data, tokenizer, length=256), set()
    while stream.state()["domains"]["a"]["epoch"] < 2:
        trained |= {text.replace("<|endoftext|>", "") for text in documents(stream.next_batch(), tokenizer)}
    assert trained == set(texts[40:]), "all others, and none that is validated on, though it stands in the file"


def test_a_fraction_of_0_makes_no_validation(recipe: Callable[..., DataRecipe], tokenizer: Any) -> None:
    assert open_validation(recipe(validation={"fraction": 0}), tokenizer, length=LENGTH) == {}


def test_validation_is_the_same_for_every_rank_and_seed(recipe: Callable[..., DataRecipe], tokenizer: Any) -> None:
    data = recipe(validation={"fraction": 0.3, "tokens": 300, "batch": 2})
    first, second = (open_validation(data, tokenizer, length=LENGTH) for _ in range(2))
    assert list(first) == ["a", "b"]
    assert rows_of(first["a"]).equal(rows_of(second["a"]))
    assert [len(batch.ids) for batch in first["a"]] == [2] * 5
    assert {name for batch in first["b"] for name in batch.domains} == {"b"}


def test_rows_come_in_the_domains_shares(recipe: Callable[..., DataRecipe], tokenizer: Any) -> None:
    counts = Counter(name for batch in take(opened(recipe(), tokenizer), 64) for name in batch.domains)
    assert counts == {"a": 192, "b": 64}


def test_dynamic_weights_survive_a_restart_on_other_ranks(recipe: Callable[..., DataRecipe], tokenizer: Any) -> None:
    data = recipe(dynamic={"form": "code"})
    stream = opened(data, tokenizer)
    stream.refer_to({"a": 2.0, "b": 3.0})
    take(stream, 3)
    share = 0.25 * math.exp(2) / (0.75 + 0.25 * math.exp(2))
    assert stream.observe({"a": 2.0, "b": 5.0})["b"] == pytest.approx(0.9999 * share + 0.0001 / 2, rel=1e-12)
    take(stream, 5)
    state = json.loads(json.dumps(stream.state()))
    others = [opened(data, tokenizer, micro_batch=2, rank=rank, world_size=2) for rank in range(2)]
    for other in others:
        other.restore(state)
    assert others[0].weights == stream.weights
    for each in (stream, *others):
        each.observe({"a": 2.5, "b": 2.9})
    expected = rows_of(take(stream, 10))
    assert rows_of([batch for _ in range(10) for batch in [other.next_batch() for other in others]]).equal(expected)


def test_a_hub_dataset_goes_on_from_its_place(
    recipe: Callable[..., DataRecipe], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    real = datasets.load_dataset
    files = str(tmp_path / "a.jsonl")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, revision, **o: real("json", data_files=files, **o))
    data = recipe(domains={"a": "org/set"})
    stream = opened(data, tokenizer)
    take(stream, 30)
    state = stream.state()
    assert state["domains"]["a"]["epoch"] > 0 or state["domains"]["a"]["block"] > 0
    expected = rows_of(take(stream, 20))
    elsewhere = recipe(domains={"a": "org/set"}, cache=str(tmp_path / "another cache"))
    again = opened(elsewhere, tokenizer)
    again.restore(state)
    assert rows_of(take(again, 20)).equal(expected)
    write(tmp_path / "a.jsonl", "other", 150)
    changed = opened(recipe(domains={"a": "org/set"}, cache=str(tmp_path / "a third cache")), tokenizer)
    with pytest.raises(UsageError, match="domain 'a': its documents have changed"):
        changed.restore(state)


def remove_file(folder: Path) -> dict[str, Any]:
    (folder / "a1.jsonl").unlink()
    return {}


def add_file(folder: Path) -> dict[str, Any]:
    write(folder / "a2.jsonl", "a", 3)
    return {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_file, r"domain 'a': .*a1\.jsonl was removed after the checkpoint was saved"),
        (add_file, r"domain 'a': .*a2\.jsonl was added after the checkpoint was saved"),
        (
            lambda _: {"packing": "concatenate"},
            "data: packing was 'best_fit' when the checkpoint was saved and is now 'conc",
        ),
        (lambda _: {"validation": {"fraction": 0.2}}, "data: validation was 0.1"),
        (lambda _: {"end_of_text": False}, "data: tokenizer was "),
    ],
)
def test_a_stream_with_other_data_cannot_be_restored(
    recipe: Callable[..., DataRecipe], tokenizer: Any, tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    write(tmp_path / "a1.jsonl", "more", 5)
    domains = {"a": str(tmp_path / "a*.jsonl")}
    state = opened(recipe(domains=domains), tokenizer).state()
    again = opened(recipe(domains=domains, **change(tmp_path)), tokenizer)
    with pytest.raises(UsageError, match=message) as caught:
        again.restore(state)
    assert caught.value.hint


def mended(path: Path, number: int, text: str) -> None:
    """Another document in a line's place, of the same length: shards stay where they are."""
    lines = path.read_text().splitlines()
    before = json.loads(lines[number])["text"]
    lines[number] = json.dumps({"text": (text + before)[: len(before)]})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.long
def test_a_mended_file_goes_on_at_its_place(recipe: Callable[..., DataRecipe], tokenizer: Any, tmp_path: Path) -> None:
    """Shards of 256 bytes, 8 to a block, so that 150 documents are several blocks."""
    data = recipe(domains={"a": str(tmp_path / "a.jsonl")}, shuffle="2KB", validation={"fraction": 0.0})
    stream = opened(data, tokenizer)
    take(stream, 2)
    state = json.loads(json.dumps(stream.state()))
    assert state["domains"]["a"]["block"] == 0
    used, as_it_was = set(), rows_of(take(stream, 1))
    block = stream._domains["a"]._block(0, 0)
    assert block is not None
    for number in range(150):  # which documents the block in use has
        one = tokenizer(json.loads((tmp_path / "a.jsonl").read_text().splitlines()[number])["text"])["input_ids"]
        if any(np.array_equal(s.tokens[i : i + len(one)], one) for s in block.shards for i in range(len(s.tokens))):
            used.add(number)
    later = next(number for number in range(149, 0, -1) if number not in used and number % 9 > 4)
    mended(tmp_path / "a.jsonl", later, "mended")
    again = opened(data, tokenizer)
    (note,) = again.restore(state)
    assert (
        "the current block of text is unchanged, so the run continues at exactly the same position (epoch 0, block 0, row "
        in note
    )
    assert rows_of(take(again, 1)).equal(as_it_was)
    anew = opened(data, tokenizer)
    take(anew, 3)
    assert rows_of(take(again, 12)).equal(rows_of(take(anew, 12)))

    inside = next(number for number in sorted(used) if number % 9 > 4)
    mended(tmp_path / "a.jsonl", inside, "also mended")
    again, anew = opened(data, tokenizer), opened(data, tokenizer)
    (note,) = again.restore(state)
    assert "the run continues at the same row number in it (epoch 0, block 0, row " in note
    take(anew, 2)
    assert rows_of(take(again, 12)).equal(rows_of(take(anew, 12)))


def test_a_stream_with_other_domains_cannot_be_restored(
    recipe: Callable[..., DataRecipe], tokenizer: Any, tmp_path: Path
) -> None:
    state = opened(recipe(), tokenizer).state()
    with pytest.raises(UsageError, match="the domains were a, b and are now a, c"):
        opened(recipe(domains={"a": str(tmp_path / "a.jsonl"), "c": str(tmp_path / "b.jsonl")}), tokenizer).restore(
            state
        )


def test_the_embedded_texts_make_batches(tokenizer: Any, tmp_path: Path) -> None:
    data = validated(DataRecipe, {"domains": {"p": "prose", "c": "code"}, "cache": str(tmp_path)}, "data")
    batch = opened(data, tokenizer, length=128).next_batch()
    assert batch.ids.shape == batch.mask.shape == batch.positions.shape == (4, 128)
    assert set(open_validation(data, tokenizer, length=128)) == {"p", "c"}
