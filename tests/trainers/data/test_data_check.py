"""What a check says of a domain before the first step: what is read, cut and left out, and that nothing is left."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import CHATML, messages, sums, write_chats

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.files.locate import DEMO_FOLDER
from upcycle.trainers.data import token_shards
from upcycle.trainers.data.batches import open_stream, open_validation
from upcycle.trainers.data.data_check import check_data
from upcycle.trainers.recipe.data_recipe import DataRecipe

LENGTH = 48


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEMO_FOLDER / "model")


def recipe(folder: Path, text: str, **keys: Any) -> DataRecipe:
    domain = {"text": text, **keys.pop("domain", {})}
    return DataRecipe.model_validate(
        {"domains": {"chat": domain}, "cache": str(folder / "cache"), "chat_template": "turns", **keys}
    )


def checked(data: DataRecipe, tokenizer: Any, length: int = LENGTH) -> list[str]:
    said: list[str] = []
    check_data(data, tokenizer, length, said.append)
    assert said[-1].startswith("checked every row of ")
    return said[:-1]


LONG = " and".join([" one"] * 60)
MIXED = [
    *sums(12),
    messages("Hi"),
    messages("Tell me" + LONG, "No."),
    messages("Hi", "Well" + LONG),
    [{"role": "tool", "content": "3"}],
]


def test_what_is_cut_and_left_out_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    text = write_chats(tmp_path / "a.jsonl", MIXED[:-1])
    assert checked(recipe(tmp_path, text, domain={"too_long": "split"}), tokenizer) == [
        "domain chat: 15 rows, whose conversation is in column 'messages'",
        "warning: domain chat: 1 rows without an answer to learn are left out",
    ]
    cut = checked(recipe(tmp_path, text), tokenizer)
    assert "documents longer than 48 tokens lose their end (too_long: keep_start)" in cut[2]
    assert cut[3].startswith("warning: domain chat: 1 documents have nothing to learn in the 48 tokens that are kept")
    dropped = checked(recipe(tmp_path, text, domain={"too_long": "drop"}), tokenizer)
    assert "documents longer than 48 tokens are left out (too_long: drop)" in dropped[2]
    ended = checked(recipe(tmp_path, text, domain={"too_long": "keep_end"}), tokenizer)
    assert "lose their beginning (too_long: keep_end)" in ended[2]
    assert len(ended) == 3, "no answer is lost at the beginning"


def test_what_a_template_refuses_stops_the_run_or_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    text = write_chats(tmp_path / "a.jsonl", MIXED)
    with pytest.raises(
        UsageError, match=r"a\.jsonl, line 16: turns refuses this conversation: .*message 1 is of tool"
    ) as caught:
        checked(recipe(tmp_path, text), tokenizer)
    assert "broken_lines: skip" in str(caught.value.hint)
    said = checked(recipe(tmp_path, text, broken_lines="skip"), tokenizer)
    assert any(
        "1 rows that cannot be read are left out, such as " in line and "line 16: turns" in line for line in said
    )


@pytest.mark.parametrize(
    ("chats", "reason"),
    [
        ([messages("Hi")] * 3, "3 have no answer"),
        ([messages("Tell me" + LONG, "No.")] * 2, "2 have no answer within 48 tokens"),
        ([[{"role": "tool", "content": "3"}]] * 4, "4 cannot be read"),
    ],
)
def test_nothing_left_is_an_error(tmp_path: Path, tokenizer: Any, chats: Any, reason: str) -> None:
    text = write_chats(tmp_path / "a.jsonl", chats)
    with pytest.raises(UsageError, match=f"domain 'chat': nothing is left to train on: {reason}") as caught:
        checked(recipe(tmp_path, text, broken_lines="skip"), tokenizer)
    assert "--show 3" in str(caught.value.hint)


def test_what_was_checked_is_not_tokenised_again(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = recipe(tmp_path, write_chats(tmp_path / "a.jsonl", MIXED[:-1]))
    first = checked(data, tokenizer)
    monkeypatch.setattr(token_shards, "document_hash", lambda _: pytest.fail("tokenised again"))
    assert checked(data, tokenizer) == first
    assert open_stream(data, tokenizer, length=LENGTH, micro_batch=2, rank=0, world_size=1, seed=0).next_batch()


@pytest.mark.parametrize(
    ("domain", "keys", "message"),
    [
        ({}, {"packing": "concatenate"}, "has examples, and packing: concatenate would cut them"),
        ({"validation": "TEXT"}, {}, "trains on conversations, and its validation files hold text"),
        ({"text": "TEXT", "loss_on": "answers"}, {}, "loss_on: answers, but it is text, which has no answers"),
    ],
)
def test_keys_that_do_not_suit(tmp_path: Path, tokenizer: Any, domain: Any, keys: Any, message: str) -> None:
    chats = write_chats(tmp_path / "a.jsonl", sums(4))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    domain = {key: value.replace("TEXT", str(tmp_path / "b.jsonl")) for key, value in domain.items()}
    with pytest.raises(UsageError, match=message):
        checked(recipe(tmp_path, chats, domain=domain, **keys), tokenizer)


def test_rows_hold_whole_examples_that_are_learned_by_their_answers(tmp_path: Path, tokenizer: Any) -> None:
    """Every example of an epoch comes once and whole, in training or in validation, with its mask."""
    chats = sums(40)
    data = recipe(tmp_path, write_chats(tmp_path / "a.jsonl", chats), chat_template=None, validation={"fraction": 0.2})
    tokenizer.chat_template = CHATML
    try:
        stream = open_stream(data, tokenizer, length=160, micro_batch=4, rank=0, world_size=1, seed=0)
        held_out = open_validation(data, tokenizer, length=160)["chat"]
        wanted = {(*tokenizer.apply_chat_template(chat)["input_ids"], 0): chat for chat in chats}
    finally:
        tokenizer.chat_template = None
    seen: dict[str, set[Any]] = {"training": set(), "validation": set()}
    for where, batches in (("validation", held_out), ("training", [stream.next_batch() for _ in range(6)])):
        for batch in batches:
            for row in range(len(batch.ids)):
                begins = [*np.flatnonzero(batch.positions[row] == 0), int(batch.real[row].sum())]
                for start, end in pairwise(begins):
                    ids = tuple(batch.ids[row, start:end].tolist())
                    learned = tokenizer.decode(batch.ids[row, start:end][batch.mask[row, start:end]])
                    answers = [each["content"] for each in wanted[ids] if each["role"] == "assistant"]
                    assert learned == "".join(f"{answer}<|im_end|>\n" for answer in answers) + "<|endoftext|>"
                    seen[where].add(ids)
                assert not batch.mask[row, begins[-1] :].any()
    assert not seen["training"] & seen["validation"]
    assert seen["training"] | seen["validation"] == set(wanted)
