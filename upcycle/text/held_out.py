"""What of a text is calibrated on, what is kept to measure on, and how much of another text was seen before.

A text that consists of documents (rows of a data set or of a ``.jsonl`` file) is divided by document: about one of eight is held
out, chosen by its hash, so that copies of a document are on one side. A file is one document: its last quarter is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from upcycle.text.reading.plain_text import DEMO_TEXTS, read_text
from upcycle.text.windows import divided

HELD_OUT_DOCUMENTS = 8  # one of so many
_MOST_LINES = 1000  # hashes that are kept of what was read
_LEAST_CHARACTERS = 40  # shorter lines are in many texts
FLATTERING = 0.01  # the share of seen lines from which on it is said


class Parts(NamedTuple):
    """``read`` is calibrated on, ``held_out`` is not; ``how`` says what that part is."""

    read: str
    held_out: str
    how: str


def by_position(content: str) -> Parts:
    """One document: all but its last quarter is read."""
    return Parts(*divided(content), "the last quarter")


def by_document(documents: Iterable[str], characters: int) -> Parts:
    """As many documents as are needed to read ``characters``, and those held out on the way.

    One document alone, or copies of one, are divided by position.
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
    """The smallest hashes of the lines of some texts, as hexadecimal numbers: enough to know the texts by, not to read them."""
    found = set().union(*map(_lines, contents))
    return [f"{one:012x}" for one in sorted(found)[:_MOST_LINES]]


def seen_share(content: str, read: Sequence[str]) -> float:
    """Which share of a text's lines was in what ``read`` is a :func:`sketch` of, estimated from those that it would hold.

    All hashes up to the largest of a full sketch are as good a sample of one text as of the other.
    """
    known = {int(one, 16) for one in read}
    if not known:
        return 0.0
    border = max(known) if len(known) >= _MOST_LINES else 1 << 48
    sample = [one for one in _lines(content) if one <= border]
    return sum(one in known for one in sample) / len(sample) if sample else 0.0


def unseen(name: str, calibration: Mapping[str, Any] | None) -> tuple[str, str]:
    """A text to measure a model on, without what the model was calibrated on where that is known, and a remark.

    Args:
        name: UTF-8 file, or an embedded text.
        calibration: what ``upcycle.json`` says of the calibration; None: there was none.

    Returns:
        The text, and what has to be said of it; empty as a rule.

    Raises:
        UsageError: the text cannot be read.
    """
    content, record, remark = read_text(name), calibration or {}, ""
    named = [PurePath(str(text)).name for text in record.get("text") or []]
    if name in named or (name in DEMO_TEXTS and "demo" in named) or PurePath(name).name in named:
        content, remark = by_position(content).held_out, "the quarter that was held out of the calibration"
    share = seen_share(content, record.get("lines") or [])
    return content, "; ".join(filter(None, (remark, flattered(share))))


def flattered(share: float) -> str:
    """What has to be said of a text of which that share was calibrated on; empty where it is next to nothing."""
    return f"{share:.0%} of it was calibrated on: the numbers flatter" if share > FLATTERING else ""
