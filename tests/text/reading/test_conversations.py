"""Rows as conversations: every usual form becomes the same messages, and what is none is named with its line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from upcycle.errors import UsageError
from upcycle.text.reading.columns import Reading
from upcycle.text.reading.conversations import Example
from upcycle.trainers.data.corpus import LocalCorpus

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, TALK[1]]


def examples(path: Path | str, size: int = 10**6, **reading: Any) -> list[Example]:
    corpus = LocalCorpus([str(path)], Reading(**reading), size)
    found = [each for shard in range(corpus.shards or 0) for each in corpus.documents(shard)]
    assert all(isinstance(each, Example) for each in found)
    return found  # type: ignore[return-value]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "reading"),
    [
        ({"messages": TALK}, {}),
        ({"conversations": SHARED, "id": "x"}, {}),
        ({"messages": PARTS}, {}),
        ({"text": "no", "talk": TALK}, {"column": "talk"}),
        ({"messages": json.dumps(TALK)}, {}),
        ({"instruction": "Hi", "output": "Hello"}, {"prompt": ("instruction",), "response": "output"}),
        ({"a": "Hi", "b": " ", "c": "Hello"}, {"prompt": ("a", "b"), "response": "c"}),
    ],
)
def test_every_form_becomes_messages(tmp_path: Path, row: Any, reading: dict[str, Any]) -> None:
    (found,) = examples(write(tmp_path / "a.jsonl", row), **reading)
    assert list(found.messages) == TALK
    assert found.taught == (False, True)


def test_what_a_template_may_want_is_kept(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}], "content": None}
    rows = {"messages": [{**TALK[0], "name": None}, call, {**TALK[1], "weight": 0}], "tools": '[{"name": "add"}]'}
    (found,) = examples(write(tmp_path / "a.jsonl", rows))
    assert found.messages[0] == TALK[0]
    assert found.messages[1] == {"role": "assistant", "tool_calls": call["tool_calls"]}
    assert found.taught == (False, True, False)
    assert found.tools == ({"name": "add"},)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_column_of_system_messages_is_not_lost(tmp_path: Path, ending: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [{"messages": TALK, "system": "Be brief."}, {"messages": TALK, "system": None}]
    if ending == "jsonl":
        path = write(tmp_path / "a.jsonl", *rows, {"messages": [system, *TALK], "system": "Be long."})
    else:
        datasets = pytest.importorskip("datasets")
        path = tmp_path / "a.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
    first, second, *third = examples(path)
    assert (list(first.messages), first.taught) == ([system, *TALK], (False, False, True))
    assert list(second.messages) == TALK
    assert [list(each.messages) for each in third] == [[system, *TALK]] * len(third)


def test_times_beside_what_is_said_are_no_obstacle(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    chats = [[{**message, "at": datetime(2026, 1, day, tzinfo=UTC)} for message in TALK] for day in (1, 2)]
    datasets.Dataset.from_list([{"messages": chat} for chat in chats]).to_parquet(tmp_path / "a.parquet")
    first, second = examples(tmp_path / "a.parquet")
    assert first.content != second.content


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_tables_hold_the_same(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": [{**TALK[0], "content": f"Hi {n}"}, TALK[1]], "n": n} for n in range(25)]
    table = datasets.Dataset.from_list(rows)
    if kind == "parquet":
        table.to_parquet(tmp_path / "a.parquet", batch_size=10)
        path = tmp_path / "a.parquet"
    else:
        datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "set", num_shards={"train": 2})
        path = tmp_path / "set" / "train"
        if kind == "arrow":
            path = path / "*.arrow"
    found = examples(path, size=100)
    assert [each.messages[0]["content"] for each in found] == [f"Hi {n}" for n in range(25)]
    assert str(found[0].where).endswith("row 1")
    assert list(found[3].messages) == [{**TALK[0], "content": "Hi 3"}, TALK[1]]
    if kind == "saved":
        with pytest.raises(UsageError, match="a folder of several datasets: train") as caught:
            examples(tmp_path / "set")
        assert caught.value.hint == f"name one: {tmp_path / 'set'}/train"


FAULTS: dict[str, tuple[Any, str]] = {
    "a role": (
        {"messages": [{"role": "bot", "content": "x"}]},
        "message 1 of 'messages' has the role 'bot'; known are system",
    ),
    "no content": ({"messages": [TALK[0], {"role": "assistant"}]}, "message 2 of 'messages' has no content"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, "has content of type int, not text"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has parts other than text"),
    "text": ({"messages": "Hi"}, "column 'messages' holds str, not a list of messages"),
    "no message": ({"messages": ["Hi"]}, "message 1 of 'messages' is str, not a role and content"),
    "a weight": ({"messages": [TALK[0], {**TALK[1], "weight": 0.5}]}, "has weight 0.5, and only 0 and 1 are known"),
    "tools": ({"messages": TALK, "tools": "{"}, "column 'tools' is not a list of tools"),
    "unequal lists": (
        {"messages": {"role": ["user", "assistant"], "content": ["Hi"]}},
        r"lists of unequal length \(2 of role, 1 of content\)",
    ),
    "cut": ('{"messages": [{"role', "is not JSON"),
    "gone": ({"other": 1}, "no column 'messages'; the columns are other"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_far_inside_is_named_with_its_line(tmp_path: Path, fault: str) -> None:
    row, message = FAULTS[fault]
    path = write(tmp_path / "a.jsonl", *[{"messages": TALK}] * 60, row, {"messages": None})
    for size in (10**6, 700):  # the second time, the line is in a later piece of the file
        with pytest.raises(UsageError, match=message) as caught:
            examples(path, size)
        assert f"{path}, line 61" in caught.value.message
    with pytest.raises(UsageError, match=message):
        LocalCorpus([str(path)], Reading(), 700).check(tmp_path / "cache")
    found = LocalCorpus([str(path)], Reading(broken="skip"), 700).check(tmp_path / "cache")
    assert (found.documents, found.empty, found.broken) == (60, 1, 1)
    assert f"{path}, line 61" in found.first[0]


@pytest.mark.parametrize(
    ("row", "reading", "message", "hint"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, {}, "the rows are pairs of 'instruction' and 'output'",
         "prompt: [instruction, input] and response: output"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "pairs of a chosen and a rejected answer", "rejected: rejected"),
        ({"a": "x"}, {"prompt": ("a",), "response": "b"}, "no column 'b'", "name the columns in the domain"),
        ({"a": "x", "b": 3}, {"prompt": ("a",), "response": "b"}, "column 'b' holds int, not text", "broken_lines: skip"),
        ({"a": " ", "b": "x"}, {"prompt": ("a",), "response": "b"}, r"the prompt \(a\) is blank", "broken_lines: skip"),
    ],
)  # fmt: skip
def test_pairs_must_be_named(tmp_path: Path, row: Any, reading: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        examples(write(tmp_path / "a.jsonl", row), **reading)
    assert hint in str(caught.value.hint)


OTHER = [TALK[0], {"role": "assistant", "content": "Go away"}]
BOTH = {"response": "chosen", "rejected": "rejected"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"chosen": TALK, "rejected": OTHER}, ()),
        ({"chosen": "Hello", "rejected": "Go away", "ask": "Hi"}, ("ask",)),
        ({"chosen": TALK[1:], "rejected": OTHER[1:], "ask": TALK[:1]}, ("ask",)),
        ({"chosen": TALK[1:], "rejected": OTHER[1:], "ask": "Hi"}, ("ask",)),
        ({"chosen": "Hello", "rejected": "Go away", "ask": TALK[:1]}, ("ask",)),
    ],
)
def test_preferences_are_two_answers_to_the_same(tmp_path: Path, row: Any, prompt: Any) -> None:
    (found,) = examples(write(tmp_path / "a.jsonl", row), prompt=prompt, **BOTH)
    assert (list(found.messages), list(found.rejected), found.taught) == (TALK, OTHER, (False, True))


def test_a_column_of_system_messages_belongs_to_preferences_of_every_form(tmp_path: Path) -> None:
    answers = {"chosen": "Hello", "rejected": "Go away"}, {"chosen": TALK[1:], "rejected": OTHER[1:]}
    path = write(tmp_path / "a.jsonl", *({**each, "ask": "Hi", "system": "Be brief."} for each in answers))
    system = {"role": "system", "content": "Be brief."}
    for found in examples(path, prompt=("ask",), **BOTH):
        assert (list(found.messages), list(found.rejected)) == ([system, *TALK], [system, *OTHER])
    for found in examples(path, prompt=("system", "ask"), **BOTH):  # it is there already
        assert list(found.messages) == [{"role": "user", "content": "Be brief.\n\nHi"}, TALK[1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": TALK[1:], "rejected": OTHER[1:]}, "line 2: no column 'ask'"),
        ({"ask": 3, "chosen": TALK[1:], "rejected": OTHER[1:]}, "line 2: column 'ask' holds int, not text"),
        ({"ask": " ", "chosen": TALK[1:], "rejected": OTHER[1:]}, r"line 2: the prompt \(ask\) is blank"),
        ({"ask": "Hi", "chosen": "Hello", "rejected": " "}, "line 2: column 'rejected' does not end with an answer"),
        (
            {"ask": "Hi", "chosen": TALK, "rejected": OTHER},
            "line 2: column 'chosen' holds 2 messages, and beside a prompt",
        ),
    ],
)
def test_a_prompt_in_a_column_of_its_own_is_neither_lost_nor_doubled(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"ask": "Hi", "chosen": "Hello", "rejected": "Go away"}, row)
    with pytest.raises(UsageError, match=message):
        examples(path, prompt=("ask",), **BOTH)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"chosen": TALK, "rejected": [TALK[0], {**TALK[1], "content": " Hello "}]},
            "line 2: the answers in 'chosen' and 'rejected' are equal",
        ),
        ({"chosen": TALK, "rejected": [{"role": "user", "content": "Yo"}, TALK[1]]}, "answer different conversations"),
        ({"chosen": TALK, "rejected": TALK[:1]}, "column 'rejected' does not end with an answer"),
        ({"chosen": TALK, "rejected": "Go away"}, "column 'rejected' holds str, not a list of messages"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"chosen": TALK, "rejected": OTHER}, row)
    with pytest.raises(UsageError, match=message):
        LocalCorpus([str(path)], Reading(**BOTH), 1000).check(tmp_path / "cache")


def test_plain_text_is_no_conversation(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("text")
    write(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(UsageError, match=r"b\.txt is plain text, without columns"):
        LocalCorpus([str(tmp_path / "*")], Reading(), 10**6)


def test_equal_conversations_have_equal_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": TALK}, {"messages": PARTS, "id": 3}, {"messages": [*TALK, *TALK]})
    first, second, third = examples(path)
    assert first.content == second.content != third.content
