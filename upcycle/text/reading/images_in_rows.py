"""Images of conversations: named in parts of messages, or in columns beside these, with marks in the text where they belong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

MARK = "<image>"  # in a text, as LLaVA's files have it
COLUMNS = ("images", "image")  # columns of names, by their usual names
IMAGE_PART: dict[str, Any] = {"type": "image"}
_TYPES = ("image", "image_url")
_KEYS = ("image", "path", "url", "image_url")  # of a part, where its image is
_FILE = "file://"


class ImagesRefusedError(ValueError):
    """A row's images cannot be read, or do not fit its messages; the message says why."""


def is_image_part(part: Any) -> bool:
    """Return whether a part of a message's content is an image."""
    return isinstance(part, Mapping) and part.get("type") in _TYPES


def has_images(row: Any) -> bool:
    """Return whether a row names images: in a column of its own, or in parts of messages."""
    if not isinstance(row, Mapping):
        return False
    messages = (message for value in row.values() if isinstance(value, list) for message in value)
    parts = (m.get("content") for m in messages if isinstance(m, Mapping))
    return any(row.get(column) is not None for column in COLUMNS) or any(
        is_image_part(part) for content in parts if isinstance(content, list) for part in content
    )


def placed_images(
    messages: Sequence[Mapping[str, Any]], row: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return messages whose images are parts of their own, and the images' names in this order.

    Names of columns go to the marks and to parts without a name, in order; where there are none, to the beginning of the first message
    of a user. A message without an image keeps its text as it is.

    Args:
        messages: with ``role`` and ``content``, a text or a list of parts.
        row: the columns beside them.

    Raises:
        ImagesRefusedError: there are more or fewer images than places, one is in an answer, or one is no file.
    """
    beside = [name for column in COLUMNS for name in _names(row.get(column))]
    marked = bool(beside)
    found = [{**message, "content": _parts(message.get("content", ""), marked)} for message in messages]
    places = [part for message in found for part in message["content"] if is_image_part(part)]
    free = sum(part["name"] is None for part in places)
    if beside and not places:
        first = next((message for message in found if message["role"] == "user"), None)
        if first is None:
            raise ImagesRefusedError("there are images, and no message of a user")
        places = [{**IMAGE_PART, "name": None} for _ in beside]
        first["content"] = [*places, *first["content"]]
        free = len(places)
    if free != len(beside):
        raise ImagesRefusedError(
            f"{len(beside)} images in columns ({', '.join(COLUMNS)}), and {free} places without a name ({MARK} or parts) for them"
        )
    if any(is_image_part(part) for message in found if message["role"] == "assistant" for part in message["content"]):
        raise ImagesRefusedError("an answer has an image, and only texts are learned")
    names = iter(beside)
    order = tuple(next(names) if part["name"] is None else str(part["name"]) for part in places)
    return [{**message, "content": _plain(message["content"])} for message in found], order


def flat(content: Any, mark: str) -> str:
    """Return a message's content as one text, with a mark for every image; behind it a new line begins, unless nothing follows."""
    if isinstance(content, str):
        return content
    text = ""
    for part in content:
        said = mark if is_image_part(part) else str(part["text"])
        new_line = text.endswith(mark) and said != mark and not said[:1].isspace()
        text += "\n" + said if new_line else said
    return text


def texts_in(content: Any) -> list[str]:
    """Return the texts of a message's content, between its images."""
    if isinstance(content, str):
        return [content]
    return [str(part["text"]) for part in content or () if not is_image_part(part)]


def _parts(content: Any, marked: bool) -> list[dict[str, Any]]:
    """Return parts with a ``text``, or with the ``name`` of an image; ``marked``: texts may have marks."""
    found: list[dict[str, Any]] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
        if is_image_part(part):
            found.append({**IMAGE_PART, "name": _name_in(part)})
        elif marked:
            found += _split(str(part["text"]))
        else:
            found.append({"type": "text", "text": str(part["text"])})
    return found


def _split(text: str) -> Iterator[dict[str, Any]]:
    first, *others = text.split(MARK)
    pieces = [first, *(piece.removeprefix("\n") for piece in others)]
    for number, piece in enumerate(pieces):
        if number:
            yield {**IMAGE_PART, "name": None}
        said = piece if number + 1 == len(pieces) else piece.removesuffix("\n")
        if said:
            yield {"type": "text", "text": said}


def _plain(parts: list[dict[str, Any]]) -> Any:
    """Return parts as a template takes them; a content without images is one text again."""
    if not any(map(is_image_part, parts)):
        return "".join(part["text"] for part in parts)
    return [dict(IMAGE_PART) if is_image_part(part) else part for part in parts]


def _name_in(part: Mapping[str, Any]) -> str | None:
    value = next((part[key] for key in _KEYS if part.get(key) is not None), None)
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]
    names = list(_names(value))
    return names[0] if names else None


def _names(value: Any) -> Iterator[str]:
    """Yield the names in a column or a part."""
    if value is None:
        return
    if isinstance(value, list):
        for each in value:
            yield from _names(each)
        return
    if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
        value = value["path"]
    if not isinstance(value, str):
        what = "bytes" if isinstance(value, Mapping) else type(value).__name__
        raise ImagesRefusedError(
            f"an image is given as {what}, not as the name of a file: save it as one, and put its name here"
        )
    value = value.removeprefix(_FILE)
    if "://" in value or value.startswith("data:"):
        raise ImagesRefusedError(f"an image is no file: {value[:60]}; download it, and put the file's name here")
    if not value.strip() or PurePath(value).name == "":
        raise ImagesRefusedError("an image has an empty name")
    yield value
