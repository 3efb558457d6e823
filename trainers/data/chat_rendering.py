"""Conversations as text, and where in it the answers are: as the template marks them, or by what it adds turn by turn."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from upcycle.text.reading.conversations import ANSWERS, Example
from upcycle.text.reading.images_in_rows import texts_in
from upcycle.trainers.data.chat_templates import ChatTemplate

Span: TypeAlias = tuple[int, int]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHT = "</think>"  # what is before it, templates may leave out of earlier answers
_ASKED = "What is shown?"  # by takes_images
_QUOTED = 60  # characters of a message in an error
_ONE_AT_A_TIME = (
    threading.Lock()
)  # transformers keeps the marks of a text in the compiled template, which threads share
# A template that asks for the date is told this one, which Llama 3's names as its default: text must not depend on the day.
_DATE = """\
{%- macro strftime_now(format) -%}
{{- {'%d %b %Y': '26 Jul 2024', '%d %B %Y': '26 July 2024', '%B %d, %Y': 'July 26, 2024'}.get(format, '2024-07-26') -}}
{%- endmacro -%}
"""


class RefusedError(ValueError):
    """A template cannot write a conversation, or not so that its answers can be found; the message says why."""


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, and the characters of its answers that are learned, from and to, in order."""

    text: str
    answers: tuple[Span, ...]


class Renderer:
    """Writes conversations as a template does, in transformers' sandbox."""

    def __init__(self, tokenizer: Any, template: ChatTemplate, everything: bool = False) -> None:
        """``everything``: all of a text is learned, so that its answers need not be found."""
        self._tokenizer, self.name, self._everything = tokenizer, template.name, everything
        self._source = (_DATE if "strftime_now" in template.source else "") + template.source
        self._marks = bool(_MARKS.search(template.source))

    def takes_images(self, token: str) -> bool:
        """Whether the template writes ``token`` for an image among the parts of a message, and not a list as it stands."""
        parts = [{"type": "image"}, {"type": "text", "text": _ASKED}]
        try:
            text = self._text([{"role": "user", "content": parts}], [])
        except RefusedError:
            return False
        return text.count(token) == 1 and _ASKED in text and str(parts[0]) not in text

    def __call__(self, example: Example) -> Rendered:
        """The text of a conversation, with its answers.

        Raises:
            RefusedError: the template fails, leaves out a message, or writes one turn otherwise when others follow.
        """
        messages, tools = list(example.messages), list(example.tools)
        if self._everything:
            text = self._text(messages, tools)
            _check_whole(messages, text, [(0, len(text))], self.name)
            return Rendered(text, ((0, len(text)),))
        if self._marks:
            text, marked = self._marked(messages, tools)
            answers = _per_answer(messages, marked, example)
        else:
            text = self._text(messages, tools)
            answers = self._by_prefixes(messages, tools, text)
        _check_whole(messages, text, answers, self.name)
        taught = [
            taught for message, taught in zip(messages, example.taught, strict=True) if message["role"] == ANSWERS
        ]
        if len(answers) == len(taught):
            answers = [span for span, counts in zip(answers, taught, strict=True) if counts]
        return Rendered(text, tuple(span for span in answers if text[slice(*span)].strip()))

    @contextmanager
    def _rendering(self) -> Iterator[None]:
        from jinja2 import TemplateError

        try:
            with _ONE_AT_A_TIME:
                yield
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise RefusedError(f"{self.name} refuses this conversation: {error}") from None

    def _text(self, messages: list[Any], tools: list[Any], prompt: bool = False) -> str:
        with self._rendering():
            text: str = self._tokenizer.apply_chat_template(
                messages, tools or None, chat_template=self._source, tokenize=False, add_generation_prompt=prompt
            )
        return text

    def _marked(self, messages: list[Any], tools: list[Any]) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        with self._rendering():
            rendered: Any = render_jinja_template(
                conversations=[messages],
                tools=tools or None,
                chat_template=self._source,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        (text,), (marked,) = rendered
        return text, [(int(start), int(end)) for start, end in marked]

    def _by_prefixes(self, messages: list[Any], tools: list[Any], text: str) -> list[Span]:
        """Each answer is what the template writes behind the prompt that it makes of all messages before."""
        answers = []
        for place, message in enumerate(messages):
            if message["role"] != ANSWERS:
                continue
            if not place:
                raise RefusedError(f"the conversation begins with an answer, and {self.name} does not mark answers")
            prompt = self._text(messages[:place], tools, prompt=True)
            until = text if place + 1 == len(messages) else self._text(messages[: place + 1], tools)
            if not text.startswith(prompt) or not until.startswith(prompt):
                raise RefusedError(
                    f"{self.name} writes what is before message {place + 1} otherwise once the conversation goes on, so the "
                    "answer's prompt is not what it would be asked with"
                )
            answer = _found(text, len(prompt), until, message.get("content", ""))
            if answer is None:
                raise RefusedError(
                    f"{self.name} writes message {place + 1}, an answer, otherwise once the conversation goes on"
                )
            answers.append((len(prompt), len(prompt) + len(answer)))
        return answers


def _found(text: str, start: int, until: str, content: str) -> str | None:
    """The answer that begins at ``start`` of the whole text, from the text ``until`` its end.

    Some templates write the last answer with an empty thought before it or with other blanks behind it than earlier ones.
    """
    whole = until[start:]
    said = content.rpartition(_THOUGHT)[2].strip()
    alone = whole[whole.rfind(said) :]
    for answer in (whole, whole.rstrip(), alone, alone.rstrip()):
        if answer.strip() and said in answer and text.startswith(answer, start):
            return answer
    return None


def _per_answer(messages: Sequence[Any], marked: list[Span], example: Example) -> list[Span]:
    answers = [message for message in messages if message["role"] == ANSWERS]
    if answers and not marked:
        raise RefusedError("the template marks no answer, although it has a block for it")
    left_out = any(
        message["role"] == ANSWERS and not taught for message, taught in zip(messages, example.taught, strict=True)
    )
    if left_out and len(marked) != len(answers):
        raise RefusedError(
            f"the template marks {len(marked)} answers of {len(answers)}, so those of weight 0 cannot be told from the others"
        )
    return marked


def _check_whole(messages: Sequence[Any], text: str, answers: Sequence[Span], name: str) -> None:
    """Refuse a text that lacks what a message says: a template may leave turns out without an error."""
    learned = [text[slice(*span)] for span in answers]
    at = 0
    for number, message in enumerate(messages, start=1):
        answer_of = message["role"] == ANSWERS
        parts = (
            str(part).rpartition(_THOUGHT)[2] if answer_of else str(part)
            for part in texts_in(message.get("content", ""))
        )
        for said in map(str.strip, parts):
            if not said or message["role"] in ("tool", "function"):  # results of tools are often written as JSON
                continue
            if answer_of:
                there = any(said in answer for answer in learned)
            elif message["role"] == "user":
                found = text.find(said, at)
                there, at = found >= 0, max(at, found + len(said))
            else:  # some templates put the system message behind others
                there = said in text
            if not there:
                short = said if len(said) <= _QUOTED else said[:_QUOTED] + "..."
                raise RefusedError(f"{name} leaves out message {number} ({message['role']}: {short!r})")
