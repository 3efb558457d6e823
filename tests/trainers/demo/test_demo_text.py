"""The demo's split: by document, the same everywhere, and nothing held out is trained on."""

from __future__ import annotations

import pytest

from upcycle.trainers.demo.demo_text import Document, demo_documents

Sides = tuple[list[Document], list[Document]]


@pytest.fixture(scope="module")
def sides() -> Sides:
    """All of the standard library: read once."""
    return demo_documents()


@pytest.mark.long
def test_no_document_or_long_paragraph_of_validation_is_trained_on(sides: Sides) -> None:
    training, validation = sides
    assert not {d.name for d in training} & {d.name for d in validation}
    held_out = {part.strip() for d in validation for part in d.text.split("\n\n") if len(part.strip()) >= 80}
    assert len(held_out) > 100
    trained = {part.strip() for d in training for part in d.text.split("\n\n")}
    assert not held_out & trained


@pytest.mark.long
def test_docstrings_stay_with_their_module(sides: Sides) -> None:
    side: dict[str, set[bool]] = {}
    for document in sides[0] + sides[1]:
        side.setdefault(document.name.removeprefix("docstrings:"), set()).add(document.validation)
    assert all(len(sides) == 1 for sides in side.values())


@pytest.mark.long
def test_both_domains_are_on_both_sides_and_code_is_most_of_it(sides: Sides) -> None:
    training, validation = sides

    def size(found: list[Document], domain: str) -> int:
        return sum(len(document.text) for document in found if document.domain == domain)

    assert min(size(found, domain) for found in (training, validation) for domain in ("prose", "code")) > 10_000
    assert size(training, "code") > size(training, "prose")
