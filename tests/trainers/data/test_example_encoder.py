"""Ids of examples are transformers' own, and their masks are those of the answers."""

from __future__ import annotations

from typing import Any

import pytest
from chats import CHATML, THINKING, messages, sums

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.files.locate import DEMO_FOLDER
from upcycle.text.reading.conversations import Broken, Example, conversation, pair, preference
from upcycle.trainers.data.chat_templates import BUILT_IN, ChatTemplate
from upcycle.trainers.data.example_encoder import ExampleEncoder

TURNS, PLAIN = (ChatTemplate(source, "T", own=False) for source in (BUILT_IN["turns"], CHATML))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEMO_FOLDER / "model")


def examples(*chats: list[dict[str, Any]]) -> list[Any]:
    return [conversation(chat, {}, "messages", f"line {number}") for number, chat in enumerate(chats, start=1)]


def ids_of(row: list[int]) -> list[int]:
    return [token if token >= 0 else ~token for token in row]


def mask_of(row: list[int]) -> list[int]:
    return [int(token >= 0) for token in row]


def test_ids_and_masks_are_those_of_transformers(tokenizer: Any) -> None:
    chats = [*sums(12), messages("Größe? \U0001f600", "Größe: \U0001f600 é", "ok", "\U0001f600")]
    rows = ExampleEncoder(tokenizer, True, TURNS, "answers").encode(examples(*chats))
    for chat, row in zip(chats, rows, strict=True):
        wanted = tokenizer.apply_chat_template(
            chat, chat_template=TURNS.source, return_assistant_tokens_mask=True, return_dict=True
        )
        assert ids_of(list(row)) == wanted["input_ids"]
        assert mask_of(list(row)) == wanted["assistant_masks"]


@pytest.mark.parametrize("template", [PLAIN, ChatTemplate(THINKING, "T", own=False)])
def test_an_answer_ends_with_the_end_of_text(tokenizer: Any, template: ChatTemplate) -> None:
    (row, open_row) = ExampleEncoder(tokenizer, True, template, "answers").encode(
        examples(messages("Hi", "Hello!"), messages("Hi", "Hello!", "Bye"))
    )
    assert row[-1] == tokenizer.eos_token_id
    assert tokenizer.decode([token for token in row if token >= 0]).endswith("Hello!<|im_end|>\n<|endoftext|>")
    assert open_row[-1] == ~tokenizer.eos_token_id, "after a question, nothing is learned"
    (unended,) = ExampleEncoder(tokenizer, False, template, "answers").encode(examples(messages("Hi", "Hello!")))
    assert unended == row[:-1]


def test_a_prompt_and_its_response_as_they_stand(tokenizer: Any) -> None:
    encoder = ExampleEncoder(tokenizer, True, None, "answers")
    (row,) = encoder.encode([pair({"a": "Two plus", "b": " two"}, ["a"], "b", "x")])  # type: ignore[list-item]
    prompt, response = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Two plus", " two"))
    assert row == [*(~token for token in prompt), *response, tokenizer.eos_token_id]
    assert ExampleEncoder(tokenizer, True, None, "all").encode(
        [pair({"a": "Two plus", "b": " two"}, ["a"], "b", "x")]  # type: ignore[list-item]
    ) == [ids_of(list(row))]


def test_what_is_put_together_plain_is_one_prompt_and_one_answer(tokenizer: Any) -> None:
    with pytest.raises(
        UsageError, match="line 1: 4 messages, and joined: plain puts one prompt and one answer together"
    ):
        ExampleEncoder(tokenizer, True, None, "answers").encode(examples(messages("Hi", "Hello!", "Bye", "Bye!")))


def test_what_has_nothing_to_learn_and_what_is_refused(tokenizer: Any) -> None:
    encoder = ExampleEncoder(tokenizer, True, TURNS, "answers")
    chats = examples(messages("Hi"), messages("Hi", "Hello!")[::-1], messages("Hi", ""), messages("Hi", "Hello!"))
    weighted = conversation([*messages("Hi"), {"role": "assistant", "content": "x", "weight": 0}], {}, "m", "line 5")
    none, backwards, blank, good, untaught = encoder.encode([*chats, weighted])  # type: ignore[list-item]
    assert none == [] == untaught
    assert isinstance(good, list)
    assert good
    # An empty answer is one: the model learns to end at once.
    assert tokenizer.decode([token for token in blank if token >= 0]) == " <|endoftext|>"
    assert isinstance(backwards, list)  # the template does not mind
    (refused,) = ExampleEncoder(tokenizer, True, PLAIN, "answers").encode(examples(messages("Hi", "Hello!")[::-1]))
    assert isinstance(refused, Broken)
    assert refused.message.startswith("line 1: the conversation begins with an answer")


def test_everything_can_be_learned(tokenizer: Any) -> None:
    (row,) = ExampleEncoder(tokenizer, True, TURNS, "all").encode(examples(messages("Hi", "Hello!")))
    assert min(row) >= 0
    counted = ChatTemplate(CHATML.replace("'<|im_start|>'", "messages|length ~ '<|im_start|>'"), "T", own=False)
    for loss, kind in (("answers", Broken), ("all", list)):  # whose answers cannot be found
        (row,) = ExampleEncoder(tokenizer, True, counted, loss).encode(
            examples(messages("Hi", "Hello!", "Bye", "Bye!"))
        )
        assert isinstance(row, kind)


def test_a_fingerprint_is_of_template_and_loss(tokenizer: Any) -> None:
    made = [
        ExampleEncoder(tokenizer, end, template, loss).fingerprint
        for end, template, loss in ((True, TURNS, "answers"), (True, PLAIN, "answers"), (True, TURNS, "all"),
                                    (False, TURNS, "answers"), (True, None, "answers"))
    ]  # fmt: skip
    assert len(set(made)) == 5


def test_a_slow_tokenizer_is_refused(letters: Any) -> None:
    with pytest.raises(UsageError, match="conversations need a fast tokenizer"):
        ExampleEncoder(letters, True, TURNS, "answers")


def test_an_answer_that_nothing_predicts_is_none(letters: Any) -> None:
    """Of two answers to nothing, the one of a single token would leave its pair with one side."""
    found = preference({"ask": messages(""), "better": "ab", "worse": "a"}, ["ask"], "better", "worse", "x")
    assert isinstance(found, Example)
    assert ExampleEncoder(letters, False, None, "answers").encode([found]) == [[]]
    assert ExampleEncoder(letters, True, None, "answers").encode([found]) != [[]]


def test_examples_are_examples() -> None:
    assert isinstance(examples(messages("Hi", "Hello!"))[0], Example)
