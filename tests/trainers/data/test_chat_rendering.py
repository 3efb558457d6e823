"""Where answers are in a conversation's text: by the template's marks, and by what it adds turn by turn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from chats import CHATML, INST, THINKING, messages

from upcycle.architectures.stock import load_tokenizer
from upcycle.files.locate import DEMO_FOLDER
from upcycle.text.reading.conversations import Example, conversation
from upcycle.trainers.data.chat_rendering import RefusedError, Renderer
from upcycle.trainers.data.chat_templates import BUILT_IN, ChatTemplate

TALK = messages("Hi", "Hello!", "2+2?", "4")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEMO_FOLDER / "model")


def example(said: list[dict[str, Any]]) -> Example:
    found = conversation(said, {}, "messages", "a.jsonl, line 7")
    assert isinstance(found, Example)
    return found


def answers(tokenizer: Any, source: str, said: list[dict[str, Any]]) -> list[str]:
    rendered = Renderer(tokenizer, ChatTemplate(source, "T", own=False))(example(said))
    assert rendered.text == tokenizer.apply_chat_template(said, chat_template=source, tokenize=False)
    return [rendered.text[start:end] for start, end in rendered.answers]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (BUILT_IN["turns"], [" Hello!<|endoftext|>", " 4<|endoftext|>"]),
        (BUILT_IN["chatml"], ["Hello!<|im_end|>", "4<|im_end|>"]),
        (CHATML, ["Hello!<|im_end|>\n", "4<|im_end|>\n"]),
        (INST, [" Hello! <|endoftext|>", " 4 <|endoftext|>"]),
        (THINKING, ["Hello!<|im_end|>\n", "<think>\n\n</think>\n\n4<|im_end|>\n"]),
    ],
    ids=["turns", "chatml", "chatml without marks", "inst", "thinking"],
)
def test_answers_are_what_is_added_to_their_prompts(
    tokenizer: Any, source: str, expected: list[str], system: str | None
) -> None:
    assert answers(tokenizer, source, messages("Hi", "Hello!", "2+2?", "4", system=system)) == expected


def test_marked_and_unmarked_answers_agree(tokenizer: Any) -> None:
    """Without its marks, the same template has the same answers but for the line's end."""
    source = BUILT_IN["chatml"]
    unmarked = source.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert answers(tokenizer, unmarked, TALK) == [text + "\n" for text in answers(tokenizer, source, TALK)]


@pytest.mark.parametrize("source", [BUILT_IN["chatml"], CHATML])
def test_answers_of_weight_0_are_left_out(tokenizer: Any, source: str) -> None:
    said = example([TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]])
    rendered = Renderer(tokenizer, ChatTemplate(source, "T", own=False))(said)
    assert [rendered.text[slice(*span)].strip() for span in rendered.answers] == ["4<|im_end|>"]
    (last,) = [message for message in said.messages if message["content"] == "Hello!"]
    assert "weight" not in last


def test_a_template_that_asks_for_the_date_gives_the_same_text_every_day(tokenizer: Any) -> None:
    source = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    rendered = Renderer(tokenizer, ChatTemplate(source, "T", own=False))(example(TALK))
    assert rendered.text.startswith("26 Jul 2024\n")


def test_threads_do_not_mix_their_marks(tokenizer: Any) -> None:
    """transformers raises, or marks wrong places, where two threads render one template at the same time."""
    render = Renderer(tokenizer, ChatTemplate(BUILT_IN["chatml"], "T", own=False))
    chats = [example(messages(*["Hi", "Hello! " * (1 + number % 5)] * (1 + number % 7))) for number in range(200)]
    alone = [render(chat) for chat in chats]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(render, chats)) == alone


NO_SYSTEM = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
LAST_TWO = CHATML.replace("in messages %}", "in messages[-2:] %}")
COUNTED = CHATML.replace("'<|im_start|>'", "messages|length ~ '<|im_start|>'")
SHOUTED = CHATML.replace("message['content']", "message['content'] | upper")
UNMARKED = "{% if false %}{% generation %}{% endgeneration %}{% endif %}" + CHATML
HALF_MARKED = BUILT_IN["chatml"].replace("message.content + '<|im_end|>' -}}{%- endgen", "'' }}{%- endgen")


@pytest.mark.parametrize(
    ("source", "said", "message"),
    [
        (INST, messages("Hi", "Hello!")[::-1], "T refuses this conversation: roles must alternate"),
        (NO_SYSTEM, messages("Hi", "Hello!", system="Be brief."), r"T leaves out message 1 \(system: 'Be brief.'\)"),
        (LAST_TWO, TALK, "T writes what is before message 2 otherwise|T leaves out message 1"),
        (COUNTED, TALK, "T writes what is before message 2 otherwise once the conversation goes on"),
        (SHOUTED, messages("Hi", "Hello!"), "T writes message 2, an answer, otherwise|T leaves out message 1"),
        (UNMARKED, TALK, "marks no answer, although it has a block for it"),
        (HALF_MARKED, TALK, r"T leaves out message 2 \(assistant: 'Hello!'\)"),
        (CHATML, messages("Hi", "Hello!")[1:], "the conversation begins with an answer"),
        (CHATML.replace("message['content']", "message['nothing']"), TALK, "T refuses this conversation"),
    ],
    ids=["raises", "no system", "old turns", "counts", "changes", "no marks", "wrong marks", "answer first", "no key"],
)
def test_a_template_that_does_not_keep_to_what_was_said_is_refused(
    tokenizer: Any, source: str, said: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        answers(tokenizer, source, said)
