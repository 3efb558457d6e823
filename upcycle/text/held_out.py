"""Divides texts into a part to calibrate on and a part to measure on, and tells how much of another text was calibrated on.

A text that consists of documents (rows of a dataset or of a ``.jsonl`` file) is divided by document: about one in eight is held
out, chosen by its hash, so that all copies of a document are on the same side. A plain file is one document, whose last quarter is
held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from upcycle.text.reading.plain_text import DEMO_TEXTS, SELF_WRITTEN, read_text
from upcycle.text.windows import divided

HELD_OUT_DOCUMENTS = 8  # one in so many documents is held out
_MOST_LINES = 1000  # most hashes of calibration lines that are kept
_LEAST_CHARACTERS = 40  # shorter lines occur in many texts
FLATTERING = 0.01  # a larger share of lines that were calibrated on is pointed out to the user


class Parts(NamedTuple):
    """Holds the part of a text that is calibrated on (``read``), the part that is not, and a description of the latter."""

    read: str
    held_out: str
    how: str


def by_position(content: str) -> Parts:
    """Divide a single document: its last quarter is held out."""
    return Parts(*divided(content), "the last quarter")


def by_document(documents: Iterable[str], characters: int) -> Parts:
    """Divide documents, of which as many are used as it takes to have ``characters`` to calibrate on.

    A single document, or copies of one, are divided by position.
    """
    read: list[str] = []
    held: list[str] = []
    length = 0
    for document in documents:
        if _hash(document) % HELD_OUT_DOCUMENTS:
            read.append(document)
            length += len(document)
        else:
            held.append(document)
        if length >= characters:
            break
    if not read or not held:
        everything = read or held
        chosen = min(everything, key=_hash, default="")
        if all(document == chosen for document in everything):
            return by_position(chosen)
        read = [document for document in everything if document != chosen]
        held = [document for document in everything if document == chosen]
    total = len(read) + len(held)
    return Parts("\n\n".join(read), "\n\n".join(held), f"{len(held):,} of {total:,} documents")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big")


def _lines(content: str) -> set[int]:
    stripped = (line.strip() for line in content.splitlines())
    return {_hash(line) for line in stripped if len(line) >= _LEAST_CHARACTERS}


def sketch(contents: Iterable[str]) -> list[str]:
    """Return the smallest hashes of the lines of texts, in hexadecimal: they identify the texts without containing them."""
    found = set().union(*map(_lines, contents))
    return [f"{one:012x}" for one in sorted(found)[:_MOST_LINES]]


def seen_share(content: str, read: Sequence[str]) -> float:
    """Estimate the share of a text's lines that occur in the texts of which ``read`` is a :func:`sketch`.

    The estimate uses the lines whose hashes are at most the largest one in the sketch, which are a random sample of both texts.
    """
    known = {int(one, 16) for one in read}
    if not known:
        return 0.0
    border = max(known) if len(known) >= _MOST_LINES else 1 << 48
    sample = [one for one in _lines(content) if one <= border]
    return sum(one in known for one in sample) / len(sample) if sample else 0.0


def unseen(name: str, calibration: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return a text to measure a model on, without the part that the model was calibrated on if that is known, and a remark.

    Args:
        name: UTF-8 file, or an embedded text.
        calibration: the ``calibration`` part of ``upcycle.json``; None where there was no calibration.

    Returns:
        The text, and a remark for the user, which is usually empty.

    Raises:
        UsageError: the text cannot be read.
    """
    content, record, remark = read_text(name), calibration or {}, ""
    named = [PurePath(str(text)).name for text in record.get("text") or [] if text != SELF_WRITTEN]
    if name in named or (name in DEMO_TEXTS and "demo" in named) or PurePath(name).name in named:
        content, remark = by_position(content).held_out, "the quarter that was held out of the calibration"
    share = seen_share(content, record.get("lines") or [])
    return content, "; ".join(filter(None, (remark, flattered(share))))


def flattered(share: float) -> str:
    """Return a remark on a text of which that share was calibrated on; empty where the share is negligible."""
    return f"{share:.0%} of it was calibrated on, so the numbers are too good" if share > FLATTERING else ""
