"""Images in rows: where they belong in a conversation, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from upcycle.text.reading.columns import Reading, choose_reading, document_of
from upcycle.text.reading.conversations import Broken, Example
from upcycle.text.reading.images_in_rows import flat, has_images, placed_images

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(content: Any, answer: Any = "Yes.") -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("content", "row", "made", "names"),
    [
        ("<image>\nWhat?", {"image": "a.png"}, [IMAGE, text("What?")], ("a.png",)),
        ("What?\n<image>", {"image": "a.png"}, [text("What?"), IMAGE], ("a.png",)),
        ("<image> or <image>?", {"images": ["a", "b"]}, [IMAGE, text(" or "), IMAGE, text("?")], ("a", "b")),
        ("What?", {"images": ["a", "b"]}, [IMAGE, IMAGE, text("What?")], ("a", "b")),
        ([IMAGE, text("What?")], {"images": [{"path": "a", "bytes": None}]}, [IMAGE, text("What?")], ("a",)),
        ([{"type": "image", "image": "file:///x/a"}, text("?")], {}, [IMAGE, text("?")], ("/x/a",)),
        ([text("?"), {"type": "image_url", "image_url": {"url": "a"}}], {}, [text("?"), IMAGE], ("a",)),
    ],
)
def test_images_come_where_their_marks_and_parts_are(
    content: Any, row: dict[str, Any], made: list[Any], names: tuple[str, ...]
) -> None:
    messages, images = placed_images(user(content), row)
    assert messages == user(made)
    assert images == names


def test_text_without_images_stays_as_it_is() -> None:
    assert placed_images(user("a <image> tag"), {}) == (user("a <image> tag"), ())


@pytest.mark.parametrize(
    ("messages", "row", "why"),
    [
        (user("<image> <image>"), {"image": "a"}, "1 images in columns .* and 2 places"),
        (user([IMAGE, text("?")]), {}, "0 images in columns .* and 1 places"),
        (user("<image>?", "See <image>"), {"images": ["a", "b"]}, "an answer has an image"),
        (user("<image>?"), {"image": {"bytes": b"x", "path": None}}, "given as bytes"),
        (user("<image>?"), {"image": "https://x/a.png"}, "is no file"),
        (user("<image>?"), {"image": " "}, "empty name"),
        (user("<image>?"), {"image": 7}, "given as int"),
    ],
)
def test_what_cannot_be_placed_breaks_its_row(messages: list[Any], row: dict[str, Any], why: str) -> None:
    found = document_of({"messages": messages, **row}, Reading("messages", kind="chat", images="yes"), "row 1")
    assert isinstance(found, Broken)
    assert re.search(why, found.message), found.message
    assert found.message.startswith("row 1: ")


def test_a_text_writes_marks_for_images_and_begins_a_new_line_behind_them() -> None:
    assert flat([IMAGE, text("What?")], "<i>") == "<i>\nWhat?"
    assert flat([IMAGE, text(" or "), IMAGE], "<i>") == "<i> or <i>"
    assert flat([IMAGE], "<i>") == "<i>"
    assert flat("What?", "<i>") == "What?"


def test_only_models_that_read_images_see_them() -> None:
    """What a file of a model that reads text alone has beside its text stays unread, as ever."""
    row = {"messages": user("What?"), "image": "a.png"}
    assert has_images(row)
    assert has_images({"messages": user([IMAGE, text("?")])})
    assert not has_images({"messages": user("?"), "image": None})
    of_text = choose_reading([("row 1", row)], Reading())
    assert of_text.images == "no"
    document = document_of(row, of_text, "row 1")
    assert isinstance(document, Example)
    assert document.images == ()
    pictured = choose_reading([("row 1", row)], Reading(images="maybe"))
    assert pictured.images == "yes"
    assert set(pictured.columns or ()) >= {"images", "image", "messages"}
    document = document_of(row, pictured, "row 1")
    assert isinstance(document, Example)
    assert document.images == ("a.png",)
    assert choose_reading([("row 1", {"messages": user("?")})], Reading(images="maybe")).images == "no"


def test_pairs_may_ask_by_an_image_alone_and_preferences_share_it() -> None:
    pairs = Reading(prompt=("q",), response="a", kind="pairs", images="yes")
    found = document_of({"q": "", "a": "A cat.", "image": "a.png"}, pairs, "row 1")
    assert isinstance(found, Example)
    assert found.messages[0]["content"] == [IMAGE]
    assert isinstance(document_of({"q": "", "a": "A cat.", "image": None}, pairs, "row 1"), Broken)
    better = Reading(prompt=("q",), response="b", rejected="w", kind="preferences", images="yes")
    found = document_of({"q": "<image>\nWhat?", "b": "A cat.", "w": "A dog.", "image": "a"}, better, "row 1")
    assert isinstance(found, Example)
    assert found.images == ("a",)
    assert found.messages[0] == found.rejected[0] == user([IMAGE, text("What?")])[0]


def test_equal_words_about_other_images_are_other_documents() -> None:
    reading = Reading("messages", kind="chat", images="yes")
    rows = [{"messages": user("<image>?"), "image": name} for name in ("a", "b")]
    first, second = (document_of(row, reading, "") for row in rows)
    assert isinstance(first, Example)
    assert isinstance(second, Example)
    assert first.content != second.content
