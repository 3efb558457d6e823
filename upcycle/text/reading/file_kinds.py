"""Tells the format of a data file by its name and its beginning, so that no file is read as something else."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.files.formats.parsing import parse_json, read_json
from upcycle.text.reading.compressed import inner_ending, is_compressed, opened
from upcycle.text.reading.plain_text import DEMO_TEXTS

Format = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]
FileKind = Literal["demo", "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSED = frozenset([".bz2", ".xz", ".zip", ".lz4", ".7z", ".tar", ".tgz"])
_OTHERS = {
    ".feather": "Feather",
    ".pkl": "a pickle",
    ".pickle": "a pickle",
    ".pdf": "PDF",
    ".docx": "a Word document",
}
_SPLITS, _SAVED = "dataset_dict.json", "state.json"  # what datasets' save_to_disk writes beside its data
_BEGINNING = 1 << 16  # bytes at the beginning of a file that are checked
_MARK = b"\xef\xbb\xbf"


def file_kind(path: Path, named: Format | None = None) -> FileKind:
    """Return the format in which a file is read: ``named``, or the one of its ending; files with other endings are plain text.

    Raises:
        UsageError: the file is compressed otherwise than by gzip or Zstandard, in UTF-16, binary, of a format without text, or
            named as text while it holds JSON.
        EnvironmentFault: the file cannot be read.
    """
    if path in DEMO_TEXTS.values():
        return "demo"
    ending = inner_ending(path)
    if ending in _COMPRESSED:
        raise UsageError(
            f"{path} is compressed in a way that is not read", hint="unpack it, or use .gz, .zst or Parquet"
        )
    if ending in _OTHERS:
        raise UsageError(f"{path} is {_OTHERS[ending]}, not text", hint="write its text as .jsonl, .parquet or .txt")
    kind = named or _FORMATS.get(ending)
    if kind in ("parquet", "arrow"):
        if is_compressed(path):
            raise UsageError(f"{path} is a table in a compressed file", hint="unpack it: tables are compressed inside")
        return kind
    beginning = _beginning(path)
    if kind:
        return kind
    looks = _json(beginning)
    if ending == ".json":
        if looks is None:
            raise UsageError(
                f"{path} is neither a JSON array of rows nor a JSON row on every line",
                hint='write one row per line: {"text": ...}',
            )
        return looks
    if looks:
        what = "a JSON row on every line" if looks == "jsonl" else "a JSON array"
        raise UsageError(
            f"{path} is named as text, but holds {what}",
            hint=f"rename it to .{looks}, or set format: {looks} in the domain (format: text would train on braces and keys)",
        )
    return "text"


def saved_files(folder: Path, name: str) -> list[Path]:
    """Return the Arrow files of a folder that ``datasets.Dataset.save_to_disk`` wrote, which it calls ``name``.

    Raises:
        UsageError: the folder holds several such datasets, or something else.
    """
    if (folder / _SPLITS).is_file():
        splits = read_json(folder / _SPLITS, error=UsageError).get("splits", [])
        raise UsageError(
            f"{name} is a folder of several datasets: {', '.join(map(str, splits))}",
            hint=f"name one: {name}/{next(iter(splits), 'train')}",
        )
    if not (folder / _SAVED).is_file():
        raise UsageError(f"{name} is a folder", hint=f"name its files: {name}/*.jsonl")
    listed = read_json(folder / _SAVED, error=UsageError).get("_data_files")
    names = [file.get("filename") for file in listed or () if isinstance(file, dict)]
    files = [folder / Path(str(each)).name for each in names if each]
    missing = next((file for file in files if not file.is_file()), None)
    if missing or not files:
        raise UsageError(
            f"{folder / _SAVED} names {missing or 'no files'}, which is not there", hint="save the dataset again"
        )
    return files


def _beginning(path: Path) -> bytes:
    try:
        with opened(path) as file:
            found = file.read(_BEGINNING)
    except OSError as error:
        raise EnvironmentFault(f"the data file {path} cannot be read: {error.strerror or error}") from None
    if found.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(
            f"{path} is text in UTF-16, but must be UTF-8", hint=f"iconv -f UTF-16 -t UTF-8 '{path.name}' > utf8.txt"
        )
    if b"\0" in found:
        raise UsageError(
            f"{path} holds zero bytes near byte {found.index(0)}: it is binary, or text in another encoding than UTF-8",
            hint="iconv turns other encodings into UTF-8",
        )
    return found.removeprefix(_MARK).lstrip()


def _json(beginning: bytes) -> Literal["jsonl", "json"] | None:
    """Return whether a file begins like rows of JSON, one per line, or like an array of them; None: like neither."""
    if beginning[:1] == b"[" and beginning[1:].lstrip()[:1] == b"{":
        return "json"
    if beginning[:1] != b"{":
        return None
    line, end, _ = beginning.partition(b"\n")
    try:
        return "jsonl" if isinstance(parse_json(line, "", nan=True), dict) else None
    except UpcycleError:
        # The first row may be longer than the beginning that was read.
        return "jsonl" if not end and len(beginning) > _BEGINNING // 2 else None
