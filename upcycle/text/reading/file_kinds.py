"""What a data file is: by its name, and by a look at its beginning, so that nothing is read as what it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.files.formats.parsing import parse_json
from upcycle.text.reading.plain_text import DEMO_TEXTS

Format = Literal["text", "jsonl", "json", "csv", "tsv", "parquet"]
Kind = Literal["demo", "text", "jsonl", "json", "csv", "tsv", "parquet"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_COMPRESSED = frozenset([".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4", ".7z", ".tar", ".tgz"])
_OTHERS = {
    ".arrow": "Arrow",
    ".feather": "Feather",
    ".pkl": "a pickle",
    ".pickle": "a pickle",
    ".pdf": "PDF",
    ".docx": "a Word document",
}
_BEGINNING = 1 << 16  # bytes that are looked at
_MARK = b"\xef\xbb\xbf"


def kind_of(path: Path, named: Format | None = None) -> Kind:
    """How a file is read: as ``named``, or as its ending says, whatever its case; anything else is text if it looks like it.

    Raises:
        UsageError: compressed, in UTF-16, binary, of a kind that holds no text, or named as text while it holds JSON.
        EnvironmentFault: it cannot be read.
    """
    if path in DEMO_TEXTS.values():
        return "demo"
    ending = path.suffix.lower()
    if ending in _COMPRESSED:
        raise UsageError(f"{path} is compressed", hint="unpack it, or write Parquet, which is compressed inside")
    if ending in _OTHERS:
        raise UsageError(f"{path} is {_OTHERS[ending]}, not text", hint="write its text as .jsonl, .parquet or .txt")
    kind = named or _FORMATS.get(ending)
    if kind == "parquet":
        return kind
    beginning = _beginning(path)
    if kind:
        return kind
    looks = _json(beginning)
    if ending == ".json":
        if looks is None:
            raise UsageError(
                f"{path} is neither a JSON array of rows nor a JSON row on every line",
                hint='write one row a line: {"text": ...}',
            )
        return looks
    if looks:
        what = "a JSON row on every line" if looks == "jsonl" else "a JSON array"
        raise UsageError(
            f"{path} is named as text, and holds {what}",
            hint=f"name it .{looks}, or say format: {looks} in the domain (format: text trains on braces and keys)",
        )
    return "text"


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            found = file.read(_BEGINNING)
    except OSError as error:
        raise EnvironmentFault(f"the data file {path} cannot be read: {error.strerror or error}") from None
    if found.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(
            f"{path} is text in UTF-16, and UTF-8 is read", hint=f"iconv -f UTF-16 -t UTF-8 '{path.name}' > utf8.txt"
        )
    if b"\0" in found:
        raise UsageError(
            f"{path} holds zero bytes near byte {found.index(0)}: it is binary, or text in another encoding than UTF-8",
            hint="iconv turns other encodings into UTF-8",
        )
    return found.removeprefix(_MARK).lstrip()


def _json(beginning: bytes) -> Literal["jsonl", "json"] | None:
    """Whether a file begins as rows of JSON, one on a line, or as an array of them."""
    if beginning[:1] == b"[" and beginning[1:].lstrip()[:1] == b"{":
        return "json"
    if beginning[:1] != b"{":
        return None
    line, end, _ = beginning.partition(b"\n")
    try:
        return "jsonl" if isinstance(parse_json(line, "", nan=True), dict) else None
    except UpcycleError:
        # A first row too long to be seen whole is one, too.
        return "jsonl" if not end and len(beginning) > _BEGINNING // 2 else None
