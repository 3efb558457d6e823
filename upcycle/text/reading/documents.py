"""Reads documents from local files, which are divided into pieces that can be read on their own, so that no file is too large."""

from __future__ import annotations

import csv
import glob
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.formats.parsing import parse_json
from upcycle.files.user_paths import user_path
from upcycle.text.reading.columns import Broken, text_of
from upcycle.text.reading.file_kinds import FileKind, Format, file_kind
from upcycle.text.reading.parquet_files import open_parquet, parquet_columns, parquet_texts
from upcycle.text.reading.plain_text import DEMO_TEXTS, read_text

_DEMO_DOCUMENT = 2000  # characters; the embedded texts are documents in a row, divided again at empty lines
_LARGEST_ARRAY = 1 << 30  # bytes of a JSON array, which is read whole
_TABLES = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True)
class Reading:
    """How documents are read from files.

    Attributes:
        column: the column with the text, for files of rows.
        separator: the text between documents, for plain text; None: a piece is one document.
        broken: what to do at a broken row.
    """

    column: str | None = None
    separator: str | None = None
    broken: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class FilePiece:
    """A part of a file: the lines that begin in bytes ``start`` to ``stop``, or, of Parquet, those row groups."""

    path: Path
    kind: FileKind
    start: int
    stop: int
    size: int  # bytes

    def documents(self, reading: Reading) -> Iterator[str]:
        """Yield the documents in order; broken rows are left out where ``reading`` says so.

        Raises:
            EnvironmentFault: the file is gone or cannot be read.
            UsageError: a row is broken, or the file is not of its kind.
        """
        for found in self.records(reading):
            if isinstance(found, str):
                yield found
            elif reading.broken == "stop":
                raise UsageError(
                    found.message,
                    hint="correct or remove it; to leave such rows out, set broken_lines: skip in the data",
                )

    def records(self, reading: Reading) -> Iterator[str | Broken]:
        """Yield the documents and the broken rows in order.

        Raises:
            EnvironmentFault: the file is gone or cannot be read.
            UsageError: the file is not of its kind.
        """
        try:
            if self.kind == "demo":
                yield from _demo(read_text(self.path.stem))
            elif self.kind == "text":
                yield from self._texts(reading.separator)
            elif self.kind == "parquet":
                assert reading.column is not None
                for text in parquet_texts(self.path, reading.column, range(self.start, self.stop)):
                    yield text or ""
            else:
                assert reading.column is not None
                for where, row in self.rows():
                    yield row if isinstance(row, Broken) else text_of(row, reading.column, where)
        except FileNotFoundError:
            raise EnvironmentFault(f"the data file {self.path} is gone", hint="put it back, then continue") from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{self.path} is not UTF-8 text: {error.reason} near byte {self.start + error.start}"
            ) from None
        except OSError as error:
            raise EnvironmentFault(f"the data file {self.path} cannot be read: {error}") from None

    def rows(self) -> Iterator[tuple[str, Any]]:
        """Yield the place of each row of JSON or of a table, and its values by column, or why it is broken."""
        if self.kind == "jsonl":
            yield from self._json_lines()
        elif self.kind == "json":
            yield from self._json_array()
        else:
            yield from self._table()

    def _texts(self, separator: str | None) -> Iterator[str]:
        text = b"".join(self._lines()).decode("utf-8")
        if separator is None:
            yield text
            return
        parts = separator.replace("\r\n", "\n").split("\n")
        for at in range(1, len(parts)):  # the piece may begin with the rest of a separator that has several lines
            rest = "\n".join(parts[at:])
            if self.start and rest and text.replace("\r\n", "\n").startswith(rest):
                text = text.replace("\r\n", "\n").removeprefix(rest)
                break
        # Lines end with CR LF in files from Windows, but with LF in the recipe's separator.
        yield from re.split("\r?\n".join(map(re.escape, parts)), text)

    def _json_lines(self) -> Iterator[tuple[str, Any]]:
        at = f"{self.path}, line " if self.start == 0 else f"{self.path}, after byte {self.start}, line "
        for number, line in enumerate(self._lines(), start=1):
            if line.strip():
                where = f"{at}{number}"
                try:
                    yield where, parse_json(line, where, error=UsageError, nan=True, halves=True)
                except UsageError as error:
                    yield where, Broken(error.message)

    def _json_array(self) -> Iterator[tuple[str, Any]]:
        if self.size > _LARGEST_ARRAY:
            raise UsageError(
                f"{self.path} is a JSON array of {self.size / 1e9:.1f} GB, which would have to be read whole",
                hint=f"write one row per line: jq -c '.[]' '{self.path.name}' > rows.jsonl",
            )
        content = b"".join(self._lines())
        rows = parse_json(content, str(self.path), error=UsageError, most_bytes=_LARGEST_ARRAY, nan=True, halves=True)
        if not isinstance(rows, list):
            raise UsageError(f"{self.path} is not a JSON array of rows")
        for number, row in enumerate(rows, start=1):
            yield f"{self.path}, row {number}", row

    def _table(self) -> Iterator[tuple[str, Any]]:
        csv.field_size_limit(sys.maxsize)  # a setting of the whole process, needed for long documents
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=_TABLES[self.kind], strict=True)
            try:
                header = next(reader, [])
                for cells in reader:
                    where = f"{self.path}, line {reader.line_num}"
                    if len(cells) == len(header):
                        yield where, dict(zip(header, cells, strict=True))
                    elif cells:
                        yield where, Broken(f"{where}: {len(cells)} columns, but the first line names {len(header)}")
            except csv.Error as error:
                raise UsageError(f"{self.path}, line {reader.line_num} is not a row of a table: {error}") from None

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            at = self.start
            if at:
                file.seek(at - 1)
                at += len(file.readline()) - 1  # a line that began earlier belongs to the piece before
            while at < self.stop and (line := file.readline()):
                yield line.removeprefix(b"\xef\xbb\xbf") if at == 0 else line
                at += len(line)


def find_pieces(texts: list[str], size: int, named: Format | None = None) -> list[FilePiece]:
    """Return pieces of about ``size`` bytes of every file that ``texts`` name, in the order of the files' paths.

    Args:
        texts: paths, globs, or names of embedded texts.
        size: bytes of a piece; a JSON array or a table is never divided.
        named: the format of all files; default: as each file's name and beginning say.

    Raises:
        UsageError: there is no such file, or it cannot be read as documents.
    """
    pieces = []
    for path in _paths(texts):
        kind, total = file_kind(path, named), path.stat().st_size
        if kind == "parquet":
            pieces += _row_groups(path, size)
        elif kind in ("text", "jsonl"):
            starts = range(0, total, size)
            pieces += [FilePiece(path, kind, at, min(at + size, total), min(size, total - at)) for at in starts]
        elif total:
            pieces.append(FilePiece(path, kind, 0, total, total))
    return pieces


def first_row(piece: FilePiece) -> Any:
    """Return the first row that can be read in a piece, which shows the file's columns; None for text, which has none.

    Raises:
        UsageError: no row can be read.
    """
    if piece.kind in ("demo", "text"):
        return None
    if piece.kind == "parquet":
        return parquet_columns(piece.path)
    fault = Broken(f"{piece.path} has no row")
    for _, row in piece.rows():
        if not isinstance(row, Broken):
            return row
        fault = row
    raise UsageError(fault.message)


def _paths(texts: list[str]) -> list[Path]:
    found: set[Path] = set()
    for name in texts:
        if name == "demo" or name in DEMO_TEXTS:
            found.update(DEMO_TEXTS.values() if name == "demo" else [DEMO_TEXTS[name]])
            continue
        pattern = str(user_path(name))
        matched = [Path(path) for path in glob.glob(pattern, recursive=True)]  # noqa: PTH207 - absolute patterns, too
        if Path(pattern).is_dir():
            raise UsageError(f"{name} is a folder", hint=f"name its files: {name}/*.jsonl")
        if Path(pattern).is_file():  # a name may hold brackets
            matched = [Path(pattern)]
        files = [path for path in matched if path.is_file()]
        if not files:
            raise UsageError(
                f"no such data file: {name}", hint="a path, a glob, demo, or a hub dataset org/name[:config[:split]]"
            )
        found.update(files)
    return sorted(found)


def _demo(text: str) -> Iterator[str]:
    parts: list[str] = []
    for part in text.split("\n\n"):
        parts.append(part)
        if sum(map(len, parts)) >= _DEMO_DOCUMENT:
            yield "\n\n".join(parts)
            parts = []
    yield "\n\n".join(parts)


def _row_groups(path: Path, size: int) -> list[FilePiece]:
    pieces: list[FilePiece] = []
    with open_parquet(path) as file:
        for group in range(file.num_row_groups):
            weight = file.metadata.row_group(group).total_byte_size
            if pieces and pieces[-1].size + weight <= size:
                weight += pieces[-1].size
                pieces[-1] = FilePiece(path, "parquet", pieces[-1].start, group + 1, weight)
            else:
                pieces.append(FilePiece(path, "parquet", group, group + 1, weight))
    return pieces
