"""Reads documents from local files, which are divided into pieces that can be read on their own, so that no file is too large."""

from __future__ import annotations

import csv
import glob
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.formats.parsing import parse_json
from upcycle.files.user_paths import user_path
from upcycle.text.reading.columns import Reading, document_of
from upcycle.text.reading.compressed import UNPACKED, is_compressed, lines_before, opened
from upcycle.text.reading.conversations import Broken, TextOrExample
from upcycle.text.reading.file_kinds import FileKind, Format, file_kind, saved_files
from upcycle.text.reading.plain_text import DEMO_TEXTS, read_text
from upcycle.text.reading.table_rows import TableKind, opened_table

_DEMO_DOCUMENT = 2000  # characters; the embedded texts are documents in a row, divided again at empty lines
_LARGEST_WHOLE = 1 << 30  # bytes of what is read whole: a JSON array, or a compressed text with a separator
_END = 1 << 62  # behind the last byte of every file
_TABLES = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True)
class LinePlace:
    """A line of a file, counted from ``start``, a byte; as a string, it is counted from the file's beginning."""

    path: Path
    start: int
    line: int

    def __str__(self) -> str:
        return f"{self.path}, line {self.line + lines_before(self.path, self.start)}"


@dataclass(frozen=True)
class FilePiece:
    """A part of a file: the lines that begin in bytes ``start`` to ``stop``, or, of Parquet and Arrow, those groups of rows.

    A compressed file is one piece, since it can only be read from its beginning.
    """

    path: Path
    kind: FileKind
    start: int
    stop: int
    size: int  # bytes
    cut: int = _END  # bytes after which a compressed text without a separator is cut, at the end of a line

    def documents(self, reading: Reading) -> Iterator[TextOrExample]:
        """Yield the documents in order; broken rows are left out where ``reading`` says so.

        Raises:
            EnvironmentFault: the file is gone or cannot be read.
            UsageError: a row is broken, or the file is not of its kind.
        """
        for found in self.records(reading):
            if not isinstance(found, Broken):
                yield found
            elif reading.broken == "stop":
                raise UsageError(
                    found.message,
                    hint="correct or remove it; to leave such rows out, set broken_lines: skip in the data",
                )

    def records(self, reading: Reading) -> Iterator[TextOrExample | Broken]:
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
            else:
                reading = reading.of_file(self.path)
                for where, row in self.rows(reading):
                    yield row if isinstance(row, Broken) else document_of(row, reading, where)
        except FileNotFoundError:
            raise EnvironmentFault(f"the data file {self.path} is gone", hint="put it back, then continue") from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{self.path} is not UTF-8 text: {error.reason} near byte {self.start + error.start}"
            ) from None
        except OSError as error:
            raise EnvironmentFault(f"the data file {self.path} cannot be read: {error}") from None

    def rows(self, reading: Reading) -> Iterator[tuple[object, Any]]:
        """Yield the place of each row, and its values by column, or why it is broken; of Parquet and Arrow only ``reading``'s."""
        if self.kind in ("parquet", "arrow"):
            with opened_table(self.path, self.kind) as table:
                for number, row in table.rows(reading.columns or (), range(self.start, self.stop)):
                    yield f"{self.path}, row {number}", row
        elif self.kind == "jsonl":
            yield from self._json_lines()
        elif self.kind == "json":
            yield from self._json_array()
        else:
            yield from self._table()

    def _texts(self, separator: str | None) -> Iterator[str]:
        if separator is None:
            yield from self._cut_texts()
            return
        text = self._whole("a compressed text with a separator").decode("utf-8")
        parts = separator.replace("\r\n", "\n").split("\n")
        for at in range(1, len(parts)):  # the piece may begin with the rest of a separator that has several lines
            rest = "\n".join(parts[at:])
            if self.start and rest and text.replace("\r\n", "\n").startswith(rest):
                text = text.replace("\r\n", "\n").removeprefix(rest)
                break
        # Lines end with CR LF in files from Windows, but with LF in the recipe's separator.
        yield from re.split("\r?\n".join(map(re.escape, parts)), text)

    def _cut_texts(self) -> Iterator[str]:
        lines: list[bytes] = []
        size = 0
        for line in self._lines():
            lines.append(line)
            size += len(line)
            if size >= self.cut:
                yield b"".join(lines).decode("utf-8")
                lines, size = [], 0
        if lines:
            yield b"".join(lines).decode("utf-8")

    def _whole(self, what: str) -> bytes:
        lines: list[bytes] = []
        size = 0
        for line in self._lines():
            lines.append(line)
            size += len(line)
            if size > _LARGEST_WHOLE:
                raise UsageError(
                    f"{self.path} is {what} of more than {_LARGEST_WHOLE / 1e9:.1f} GB, which would have to be read whole",
                    hint="divide it into several files, or write one row per line (.jsonl; of an array: jq -c '.[]')",
                )
        return b"".join(lines)

    def _json_lines(self) -> Iterator[tuple[object, Any]]:
        for number, line in enumerate(self._lines(), start=1):
            if line.strip():
                where = LinePlace(self.path, self.start, number)
                try:
                    yield where, parse_json(line, "", error=UsageError, nan=True, halves=True)
                except UsageError as error:
                    yield where, Broken(f"{where}{error.message}")

    def _json_array(self) -> Iterator[tuple[object, Any]]:
        content = self._whole("a JSON array")
        rows = parse_json(content, str(self.path), error=UsageError, most_bytes=_LARGEST_WHOLE, nan=True, halves=True)
        if not isinstance(rows, list):
            raise UsageError(f"{self.path} is not a JSON array of rows")
        for number, row in enumerate(rows, start=1):
            yield f"{self.path}, row {number}", row

    def _table(self) -> Iterator[tuple[object, Any]]:
        csv.field_size_limit(sys.maxsize)  # a setting of the whole process, needed for long documents
        with opened(self.path) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as file:
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
        with opened(self.path) as file:
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
        if kind in ("parquet", "arrow"):
            pieces += _row_groups(path, kind, size)
        elif is_compressed(path):
            pieces += [whole_piece(path, kind, size)] if total else []
        elif kind in ("text", "jsonl"):
            starts = range(0, total, size)
            pieces += [FilePiece(path, kind, at, min(at + size, total), min(size, total - at)) for at in starts]
        elif total:
            pieces.append(FilePiece(path, kind, 0, total, total))
    return pieces


def whole_piece(path: Path, kind: FileKind, cut: int = _END) -> FilePiece:
    """Return a file as one piece; a compressed text without a separator is cut into documents of about ``cut`` bytes."""
    total = path.stat().st_size * (UNPACKED if is_compressed(path) else 1)
    return FilePiece(path, kind, 0, _END, total, cut)


def first_row(piece: FilePiece) -> Any:
    """Return the first row that can be read in a piece, which shows the file's columns; None for text, which has none.

    Tables give what stands for each column's values (:meth:`upcycle.text.reading.table_rows.Table.columns`).

    Raises:
        UsageError: no row can be read.
    """
    if piece.kind in ("demo", "text"):
        return None
    if piece.kind in ("parquet", "arrow"):
        with opened_table(piece.path, piece.kind) as table:
            return table.columns()
    fault = Broken(f"{piece.path} has no row")
    for _, row in piece.rows(Reading()):
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
            found.update(saved_files(Path(pattern), name))
            continue
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


def _row_groups(path: Path, kind: TableKind, size: int) -> list[FilePiece]:
    pieces: list[FilePiece] = []
    with opened_table(path, kind) as table:
        for group, (weight, _) in enumerate(table.weights()):
            if pieces and pieces[-1].size + weight <= size:
                pieces[-1] = FilePiece(path, kind, pieces[-1].start, group + 1, pieces[-1].size + weight)
            else:
                pieces.append(FilePiece(path, kind, group, group + 1, weight))
    return pieces
