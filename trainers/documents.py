"""Local files as documents: cut into pieces that can be read alone, so that no file is too large."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.parsing import parse_json
from upcycle.text import DEMO_TEXTS, read_text

Kind = Literal["demo", "text", "jsonl", "parquet"]

_COMPRESSED = frozenset([".gz", ".zst", ".bz2", ".xz", ".zip"])
_USUAL_COLUMNS = ("text", "content")
_DEMO_DOCUMENT = 2000  # characters; the embedded texts are joined documents, cut again at empty lines
_PARQUET_ROWS = 256
_STRINGS = frozenset(["string", "large_string", "string_view"])


@dataclass(frozen=True)
class Piece:
    """A part of a file. It owns the lines that begin in bytes ``start`` to ``stop``, or those row groups."""

    path: Path
    kind: Kind
    start: int
    stop: int
    size: int  # bytes

    def documents(self, column: str | None, separator: str | None) -> Iterator[str]:
        """Its documents in order.

        Raises:
            EnvironmentFault: the file is gone or cannot be read.
            UsageError: not UTF-8, not JSON, not Parquet, or no text in the column.
        """
        try:
            if self.kind == "parquet":
                yield from _parquet(self, column)
            elif self.kind == "jsonl":
                yield from _json(self, column)
            elif self.kind == "demo":
                yield from _demo(read_text(self.path.stem))
            else:
                text = b"".join(self._lines()).decode("utf-8")
                yield from text.split(separator) if separator else [text]
        except FileNotFoundError:
            raise EnvironmentFault(f"the data file {self.path} is gone", hint="put it back, then continue") from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{self.path} is not UTF-8 text: {error.reason} near byte {self.start + error.start}"
            ) from None
        except OSError as error:
            raise EnvironmentFault(f"the data file {self.path} cannot be read: {error}") from None

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            at = self.start
            if at:
                file.seek(at - 1)
                at += len(file.readline()) - 1  # a line that began before is another piece's
            while at < self.stop and (line := file.readline()):
                at += len(line)
                yield line


def find_pieces(texts: list[str], size: int) -> list[Piece]:
    """Every file that ``texts`` name, in the order of their paths, in pieces of about ``size`` bytes.

    Raises:
        UsageError: no such file, or one that cannot be read as documents.
    """
    pieces = []
    for path in _paths(texts):
        if path in DEMO_TEXTS.values():
            pieces.append(Piece(path, "demo", 0, 1, path.stat().st_size))
        elif path.suffix in _COMPRESSED:
            raise UsageError(f"{path} is compressed", hint="unpack it, or write Parquet, which is compressed inside")
        elif path.suffix == ".parquet":
            pieces += _row_groups(path, size)
        else:
            total = path.stat().st_size
            kind: Kind = "jsonl" if path.suffix == ".jsonl" else "text"
            starts = range(0, total, size)
            pieces += [Piece(path, kind, at, min(at + size, total), min(size, total - at)) for at in starts]
    return pieces


def find_column(row: Mapping[str, Any], column: str | None, where: str) -> str:
    """The column that holds the text: the named one, ``text``, ``content``, or the only one of strings.

    Raises:
        UsageError: there is none; the message lists the columns.
    """
    texts = [name for name, value in row.items() if isinstance(value, str)]
    wanted = [column] if column else [name for name in _USUAL_COLUMNS if name in row][:1] or texts
    if len(wanted) != 1 or wanted[0] not in row:
        missing = f"no column '{column}'" if column else "no column 'text' or 'content', and not one of strings alone"
        raise UsageError(
            f"{where}: {missing}; the columns are {', '.join(sorted(row))}", hint="column: NAME in the domain"
        )
    return wanted[0]


def column_text(row: Any, column: str, where: str) -> str:
    """A row's text; a null is an empty one.

    Raises:
        UsageError: the row has no such column, or something else in it.
    """
    value = row.get(column, 0) if isinstance(row, Mapping) else 0
    if value is None:
        return ""
    if not isinstance(value, str):
        columns = ", ".join(sorted(row)) if isinstance(row, Mapping) else type(row).__name__
        raise UsageError(
            f"{where}: no text in column '{column}'; there are {columns}", hint="column: NAME in the domain"
        )
    return value


def _paths(texts: list[str]) -> list[Path]:
    found: set[Path] = set()
    for name in texts:
        if name == "demo" or name in DEMO_TEXTS:
            found.update(DEMO_TEXTS.values() if name == "demo" else [DEMO_TEXTS[name]])
            continue
        pattern = str(Path(name).expanduser())
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


def _json(piece: Piece, column: str | None) -> Iterator[str]:
    at = f"{piece.path}, line " if piece.start == 0 else f"{piece.path}, after byte {piece.start}, line "
    for number, line in enumerate(piece._lines(), start=1):
        if not line.strip():
            continue
        where = f"{at}{number}"
        row = parse_json(line, where, error=UsageError, nan=True, halves=True)
        if column is None:
            column = find_column(row if isinstance(row, dict) else {}, None, where)
        yield column_text(row, column, where)


def _row_groups(path: Path, size: int) -> list[Piece]:
    pieces: list[Piece] = []
    with _open_parquet(path) as file:
        for group in range(file.num_row_groups):
            weight = file.metadata.row_group(group).total_byte_size
            if pieces and pieces[-1].size + weight <= size:
                weight += pieces[-1].size
                pieces[-1] = Piece(path, "parquet", pieces[-1].start, group + 1, weight)
            else:
                pieces.append(Piece(path, "parquet", group, group + 1, weight))
    return pieces


def _parquet(piece: Piece, column: str | None) -> Iterator[str]:
    with _open_parquet(piece.path) as file:
        types = {field.name: str(field.type) for field in file.schema_arrow}
        name = find_column({n: "" if t in _STRINGS else None for n, t in types.items()}, column, str(piece.path))
        if types[name] not in _STRINGS:
            raise UsageError(
                f"{piece.path}: column '{name}' holds {types[name]}, not text; the columns are {', '.join(sorted(types))}",
                hint="column: NAME in the domain",
            )
        groups = list(range(piece.start, min(piece.stop, file.num_row_groups)))
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=groups, columns=[name]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise EnvironmentFault(f"{path} needs the pyarrow package", hint="pip install 'upcycle[train]'") from None
    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None
