"""Rows as conversations: OpenAI's ``messages``, ShareGPT's ``conversations``, and pairs of a prompt and a response, in one form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from upcycle.errors import UpcycleError, UsageError
from upcycle.files.formats.parsing import parse_json
from upcycle.text.reading.images_in_rows import IMAGE_PART, ImagesRefusedError, is_image_part, placed_images

ANSWERS = "assistant"
_OPENAI = ("system", "developer", "user", ANSWERS, "tool", "function")
# ShareGPT's names, and those that published sets in its form use.
_SHAREGPT = {
    "system": "system", "human": "user", "user": "user", "gpt": ANSWERS, "assistant": ANSWERS, "chatgpt": ANSWERS,
    "bing": ANSWERS, "bard": ANSWERS, "model": ANSWERS, "tool": "tool", "function_response": "tool", "observation": "tool",
}  # fmt: skip
_SYSTEM, _TOOLS = BESIDE = ("system", "tools")  # columns that belong to a conversation
_WEIGHT = "weight"  # of a message: 0 or 1, as in OpenAI's fine-tuning files


class Broken(NamedTuple):
    """A row that cannot be read; the message says where it is and why. ``image`` is the file, where that is one of its images."""

    message: str
    image: str | None = None


@dataclass(frozen=True)
class Example:
    """A conversation, whose answers are what a model learns.

    Attributes:
        messages: with ``role`` and ``content``, and whatever else the file has for a template; nothing is None.
        where: the place in its file, as ``str(where)``.
        tools: what the template is told of tools.
        taught: for each message, whether it is an answer that counts: an assistant's, unless its ``weight`` is 0.
        rejected: of a preference, the messages that are worse; they differ in the last, an answer.
        images: the names of its images, in the order of the parts ``{"type": "image"}`` of its messages.
        folder: what these names are relative to.
    """

    messages: tuple[Mapping[str, Any], ...]
    where: object
    tools: tuple[Any, ...] = ()
    taught: tuple[bool, ...] = ()
    rejected: tuple[Mapping[str, Any], ...] = ()
    images: tuple[str, ...] = ()
    folder: str = ""

    @cached_property
    def content(self) -> str:
        """All that it says, as JSON: equal conversations have equal ones, wherever they stand."""
        rejected: list[Any] = [self.rejected] if self.rejected else []
        rejected += [self.images] if self.images else []
        # Tables may have times or bytes beside what is said.
        return json.dumps([self.messages, self.tools, self.taught, *rejected], ensure_ascii=False, default=str)


TextOrExample: TypeAlias = str | Example


def is_blank(document: TextOrExample) -> bool:
    """Return whether a document has nothing to train on."""
    return not document.strip() if isinstance(document, str) else not document.messages


def content_of(document: TextOrExample) -> str:
    """Return the string by which equal documents are recognised."""
    return document if isinstance(document, str) else document.content


def conversation(
    value: Any, row: Mapping[str, Any], column: str, where: object, folder: str | None = None
) -> Example | Broken:
    """Return the conversation in a column of a row; null and an empty list are one without messages.

    Args:
        value: what the column holds: OpenAI's or ShareGPT's messages, JSON of them, or a mapping of two equally long lists, as old
            Parquet files have them.
        row: all columns; ``tools`` is handed to the template, and ``system`` becomes the first message, unless there is one.
        column: the column's name, for messages.
        where: the row's place.
        folder: what names of images are relative to; None: nothing but text is read.
    """
    value = _message_list(value, column, where)
    if isinstance(value, Broken) or not value:
        return value or Example((), where)
    messages, taught = [], []
    for number, given in enumerate(value, start=1):
        message = _message(given, f"{where}: message {number} of '{column}'", folder is not None)
        if isinstance(message, Broken):
            return message
        weight = message.pop(_WEIGHT, 1)
        if weight not in (0, 1):
            return Broken(f"{where}: message {number} of '{column}' has weight {weight!r}, and only 0 and 1 are known")
        messages.append(message)
        taught.append(message["role"] == ANSWERS and bool(weight))
    system = row.get(_SYSTEM)
    if isinstance(system, str) and system.strip() and messages[0]["role"] != _SYSTEM:
        messages, taught = [{"role": _SYSTEM, "content": system}, *messages], [False, *taught]
    tools = _tools(row.get(_TOOLS))
    if tools is None:
        return Broken(f"{where}: column '{_TOOLS}' is not a list of tools, nor JSON that holds one")
    return _pictured(Example(tuple(messages), where, tools, tuple(taught)), row, folder)


def _pictured(example: Example, row: Mapping[str, Any], folder: str | None) -> Example | Broken:
    """Return an example with its images, which are relative to ``folder``; None: it has none."""
    if folder is None:
        return example
    try:
        messages, images = placed_images(example.messages, row)
    except ImagesRefusedError as error:
        return Broken(f"{example.where}: {error}")
    return replace(example, messages=tuple(messages), images=images, folder=folder) if images else example


def pair(
    row: Mapping[str, Any], prompt: Sequence[str], response: str, where: object, folder: str | None = None
) -> Example | Broken:
    """Return a row's prompt and response as a conversation of two messages, or one without messages if the response is blank.

    Args:
        row: its columns.
        prompt: the columns of the prompt, joined by empty lines where they are not blank.
        response: the column of the response.
        where: the row's place.
        folder: as :func:`conversation`; a prompt may be blank where there are images.
    """
    question, answer = _question(row, prompt, where), _text(row, response, where)
    if isinstance(question, Broken):
        return question
    if isinstance(answer, Broken):
        return answer
    if not answer.strip():
        return Example((), where)
    messages = {"role": "user", "content": question}, {"role": ANSWERS, "content": answer}
    found = _pictured(Example(messages, where, taught=(False, True)), row, folder)
    if isinstance(found, Example) and not question and not found.images:
        return Broken(f"{where}: the prompt ({', '.join(prompt)}) is blank, but there is a response")
    return found


def preference(
    row: Mapping[str, Any],
    prompt: Sequence[str],
    chosen: str,
    rejected: str,
    where: object,
    folder: str | None = None,
) -> Example | Broken:
    """Return a row's better and worse answer to the same messages; only the last of each is compared.

    Args:
        row: its columns; the two hold conversations that differ in their last message, an answer, or answers alone, as text or as a
            list of one message, with the ``prompt`` in columns of its own.
        prompt: the columns of the prompt, as :func:`pair` reads them, or one that holds messages; none: it is in the two.
        chosen: the column of the better answer.
        rejected: the column of the worse one.
        where: the row's place.
        folder: as :func:`conversation`.
    """
    asked = _asked(row, prompt, where)
    if isinstance(asked, Broken):
        return asked
    beside = {name: value for name, value in row.items() if name not in prompt}
    sides = []
    for column in (chosen, rejected):
        answer = _answer(row.get(column), prompt, column, where)
        if isinstance(answer, list) and answer:
            answer = [*asked, *answer]
        side = answer if isinstance(answer, Broken) else conversation(answer, beside, column, where, folder)
        if isinstance(side, Broken):
            return side
        if not side.messages or side.messages[-1]["role"] != ANSWERS:
            return Broken(f"{where}: column '{column}' does not end with an answer")
        sides.append(side)
    better, worse = sides
    if better.messages[:-1] != worse.messages[:-1]:
        return Broken(
            f"{where}: '{chosen}' and '{rejected}' answer different conversations, so they cannot be compared"
        )
    said = [{**side.messages[-1], "content": side.messages[-1].get("content", "").strip()} for side in sides]
    if said[0] == said[1]:
        return Broken(f"{where}: the answers in '{chosen}' and '{rejected}' are equal, so there is nothing to prefer")
    last = (*(False for _ in better.messages[:-1]), True)
    return replace(better, taught=last, rejected=worse.messages)


def _asked(row: Mapping[str, Any], prompt: Sequence[str], where: object) -> list[Any] | Broken:
    """Return the messages that both answers of a preference follow: those in the only column of the prompt, or its text."""
    if not prompt:
        return []
    if len(prompt) == 1 and isinstance(row.get(prompt[0]), list):
        return list(row[prompt[0]])
    question = _question(row, prompt, where)
    if isinstance(question, Broken):
        return question
    if not question:
        return Broken(f"{where}: the prompt ({', '.join(prompt)}) is blank, but there are answers")
    return [{"role": "user", "content": question}]


def _answer(value: Any, prompt: Sequence[str], column: str, where: object) -> Any:
    """Return the messages in the column of an answer, or why it has none; beside a prompt, it is one message, or its text."""
    if not prompt:
        return value
    if isinstance(value, str):
        value = [{"role": ANSWERS, "content": value}] if value.strip() else []
    if isinstance(value, list) and len(value) > 1:
        return Broken(
            f"{where}: column '{column}' holds {len(value)} messages, and beside a prompt ({', '.join(prompt)}) it must be the answer "
            "alone; if they begin with the prompt, leave prompt out of the domain"
        )
    return value


def _question(row: Mapping[str, Any], prompt: Sequence[str], where: object) -> str | Broken:
    """Return the texts of the prompt's columns that are not blank, joined by empty lines."""
    texts = []
    for column in prompt:
        text = _text(row, column, where)
        if isinstance(text, Broken):
            return text
        texts += [text] if text.strip() else []
    return "\n\n".join(texts)


def _text(row: Mapping[str, Any], column: str, where: object) -> str | Broken:
    if column not in row:
        return Broken(f"{where}: no column '{column}'; the columns are {', '.join(sorted(map(str, row)))}")
    if not isinstance(row[column], str | None):
        return Broken(f"{where}: column '{column}' holds {type(row[column]).__name__}, not text")
    return row[column] or ""


def _message_list(value: Any, column: str, where: object) -> list[Any] | Broken:
    """Return the messages in any of the forms that :func:`conversation` reads, still as they are written."""
    if isinstance(value, Mapping) and value and all(isinstance(part, list) for part in value.values()):
        if len(set(map(len, value.values()))) > 1:
            sizes = ", ".join(f"{len(part)} of {name}" for name, part in value.items())
            return Broken(f"{where}: column '{column}' holds lists of unequal length ({sizes}), not a list of messages")
        value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value)
    if value is None:
        return []
    if not isinstance(value, Sequence) or isinstance(value, str):
        return Broken(f"{where}: column '{column}' holds {type(value).__name__}, not a list of messages")
    return list(value)


def _message(given: Any, where: str, pictured: bool = False) -> dict[str, Any] | Broken:
    if not isinstance(given, Mapping):
        return Broken(f"{where} is {type(given).__name__}, not a role and content")
    kept = {str(key): value for key, value in given.items() if value is not None}
    if "role" not in kept and "from" in kept:
        role = _SHAREGPT.get(str(kept.pop("from")).lower())
        content = kept.pop("value", None)
        known: Sequence[str] = tuple(_SHAREGPT)
    else:
        role = kept.pop("role", None)
        role = role if role in _OPENAI else None
        content = kept.pop("content", None)
        known = _OPENAI
    if role is None:
        return Broken(f"{where} has the role {given.get('role', given.get('from'))!r}; known are {', '.join(known)}")
    if isinstance(content, list):
        content = _with_images(content) if pictured and any(map(is_image_part, content)) else _joined(content)
        if content is None:
            return Broken(f"{where} has parts other than text, which are not trained on here")
    if content is None and "tool_calls" in kept:
        return {"role": role, **kept}
    if not isinstance(content, str | list):
        what = "no content" if content is None else f"content of type {type(content).__name__}, not text"
        return Broken(f"{where} has {what}")
    return {"role": role, "content": content, **kept}


def _with_images(parts: list[Any]) -> list[Any] | None:
    """Return parts that are texts or images, or None where there are others."""
    texts = [part if is_image_part(part) else _joined([part]) for part in parts]
    if any(text is None for text in texts):
        return None
    return [
        {"type": "text", "text": text} if isinstance(text, str) else {**IMAGE_PART, **text} for text in texts if text
    ]


def _joined(parts: list[Any]) -> str | None:
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None for part in parts
    ]
    return "".join(text for text in texts if text) if all(isinstance(text, str) for text in texts) else None


def _tools(value: Any) -> tuple[Any, ...] | None:
    """Return the tools of a row, none where it has none, or None where the value cannot be tools."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    value = _parsed(value) if isinstance(value, str) else value
    return tuple(value) if isinstance(value, list) else None


def _parsed(text: str) -> Any:
    """Return what a string of JSON holds, or the string itself where it is none."""
    try:
        return parse_json(text, "", error=UsageError, halves=True)
    except UpcycleError:
        return text
