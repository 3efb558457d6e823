"""The stream as a whole: every document once an epoch, the same rows on any number of ranks, continued bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.recipe import parse_parameters
from upcycle.text import load_tokenizer
from upcycle.trainers.data import Batch, TokenStream, open_stream, open_validation
from upcycle.trainers.data_recipe import DataRecipe

LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer(pico: Callable[[str], Path]) -> Any:
    return load_tokenizer(pico("llama"))


def write(path: Path, name: str, documents: int, words: int = 9) -> str:
    """A .jsonl file whose every document is told apart by its numbers."""
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
        return parse_parameters(DataRecipe, {"validation": {"fraction": 0.1}, **content}, "data")

    return make


def take(stream: TokenStream, calls: int) -> list[Batch]:
    return [stream.next_batch() for _ in range(calls)]


def rows_of(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([torch.stack([batch.ids, batch.positions, batch.mask.long()], 1) for batch in batches])


@pytest.mark.parametrize("packing", ["best_fit", "concatenate"])
def test_any_number_of_ranks_sees_the_same_global_batches(
    recipe: Callable[..., DataRecipe], tokenizer: Any, packing: str
) -> None:
    data = recipe(packing=packing)
    alone = rows_of(take(open_stream(data, tokenizer, length=LENGTH, micro_batch=8, rank=0, world=1, seed=3), 12))
    for world, micro in [(2, 4), (4, 1)]:
        streams = [
            open_stream(data, tokenizer, length=LENGTH, micro_batch=micro, rank=r, world=world, seed=3)
            for r in range(world)
        ]
        calls = 12 * 8 // (world * micro)
        together = [batch for _ in range(calls) for batch in [stream.next_batch() for stream in streams]]
        assert rows_of(together).equal(alone), f"{world} ranks"
        assert all(stream.state() == streams[0].state() for stream in streams)


@pytest.mark.parametrize("calls", [0, 1, 7, 40])
def test_a_restored_stream_goes_on_bit_for_bit(recipe: Callable[..., DataRecipe], tokenizer: Any, calls: int) -> None:
    data = recipe()
    stream = open_stream(data, tokenizer, length=LENGTH, micro_batch=4, rank=0, world=1, seed=3)
    take(stream, calls)
    state = json.loads(json.dumps(stream.state()))
    expected = rows_of(take(stream, 20))
    for world in (1, 2):
        again = [
            open_stream(data, tokenizer, length=LENGTH, micro_batch=4 // world, rank=r, world=world, seed=3)
            for r in range(world)
        ]
        for other in again:
            other.restore(state)
        rows = [batch for _ in range(20) for batch in [other.next_batch() for other in again]]
        assert rows_of(rows).equal(expected)
        assert again[0].state() == stream.state()


def test_validation_and_training_share_no_document(recipe: Callable[..., DataRecipe], tokenizer: Any) -> None:
    data = recipe()
    stream = open_stream(data, tokenizer, length=LENGTH, micro_batch=4, rank=0, world=1, seed=3)
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


def documents(batch: Batch, tokenizer: Any) -> list[str]:
    """The fragments of a batch as text."""
    found = []
    for ids, positions in zip(batch.ids, batch.positions, strict=True):
        starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
        found += [tokenizer.decode(ids[a:b]) for a, b in pairwise(starts)]
    return [text for text in found if text.replace("<|endoftext|>", "").strip()]


def test_a_file_that_is_gone_or_changed(recipe: Callable[..., DataRecipe], tokenizer: Any, tmp_path: Path) -> None:
    stream = open_stream(recipe(), tokenizer, length=LENGTH, micro_batch=4, rank=0, world=1, seed=3)
    state = stream.state()
    write(tmp_path / "a.jsonl", "a", 151)
    again = open_stream(recipe(), tokenizer, length=LENGTH, micro_batch=4, rank=0, world=1, seed=3)
    with pytest.raises(UsageError, match=r"domain 'a': .*a\.jsonl is not what it was when the checkpoint was saved"):
        again.restore(state)
