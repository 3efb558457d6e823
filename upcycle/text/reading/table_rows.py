"""Reads columns of Parquet and Arrow files, group by group of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from upcycle.errors import EnvironmentFault, UsageError

TableKind: TypeAlias = Literal["parquet", "arrow"]

_ROWS = 256  # rows that are in memory at a time
_STRINGS = frozenset(["string", "large_string", "string_view"])


class Table:
    """An open file: its columns, and its row groups (of Arrow: record batches)."""

    def __init__(self, path: Path, kind: TableKind) -> None:
        """Open a file.

        Raises:
            EnvironmentFault: the pyarrow package is missing.
            UsageError: the file is not of its kind.
        """
        try:
            import pyarrow
            from pyarrow import ipc, parquet
        except ImportError:
            raise EnvironmentFault(
                f"reading {path} needs the pyarrow package", hint="pip install 'upcycle[train]'"
            ) from None
        self.path, self.kind = path, kind
        try:
            if kind == "parquet":
                self._file: Any = parquet.ParquetFile(path)
                self.schema: Any = self._file.schema_arrow
                return
            self._file = pyarrow.memory_map(str(path))
            try:
                self._reader: Any = ipc.open_stream(self._file)  # as datasets writes it
            except pyarrow.ArrowInvalid:
                self._reader = ipc.open_file(self._file)
            self.schema = self._reader.schema
        except pyarrow.ArrowInvalid as error:
            name = "a Parquet" if kind == "parquet" else "an Arrow"
            raise UsageError(f"{path} is not {name} file: {str(error).splitlines()[0]}") from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def columns(self) -> dict[str, Any]:
        """Return what stands for each column's values: an empty string for text, an empty list for lists, else its type."""
        return {field.name: _sample(field.type) for field in self.schema}

    def weights(self) -> list[tuple[int, int]]:
        """Return the bytes and the number of rows of every group."""
        if self.kind == "parquet":
            groups = (self._file.metadata.row_group(number) for number in range(self._file.num_row_groups))
            return [(group.total_byte_size, group.num_rows) for group in groups]
        with self._faults():
            return [(batch.nbytes, batch.num_rows) for batch in self._batches()]

    def rows(self, columns: tuple[str, ...], groups: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number of each row of some groups in the file, from 1, and its values by column, of those that there are.

        Raises:
            UsageError: the file is damaged.
        """
        names = [name for name in columns if name in self.schema.names]
        with self._faults():
            number = 0
            for index, (batch, wanted) in enumerate(self._grouped(groups, names)):
                if index == 0 and self.kind == "parquet":
                    number = sum(rows for _, rows in self.weights()[: groups.start])
                if wanted:
                    for part in range(0, batch.num_rows, _ROWS):
                        for place, row in enumerate(batch.slice(part, _ROWS).select(names).to_pylist()):
                            yield number + part + place + 1, row
                number += batch.num_rows

    def _grouped(self, groups: range, names: list[str]) -> Iterator[tuple[Any, bool]]:
        """Yield batches, and whether they are of the groups; of Parquet only those that are."""
        if self.kind == "parquet":
            chosen = range(groups.start, min(groups.stop, self._file.num_row_groups))
            for batch in self._file.iter_batches(batch_size=_ROWS, row_groups=list(chosen), columns=names):
                yield batch, True
            return
        for place, batch in enumerate(self._batches()):
            if place >= groups.stop:
                return
            yield batch, place >= groups.start

    def _batches(self) -> Iterator[Any]:
        if hasattr(self._reader, "num_record_batches"):
            yield from map(self._reader.get_batch, range(self._reader.num_record_batches))
        else:
            yield from self._reader

    @contextmanager
    def _faults(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowInvalid, pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{self.path} is damaged: {str(error).splitlines()[0]}") from None


@contextmanager
def opened_table(path: Path, kind: TableKind) -> Iterator[Table]:
    """Open a file for the ``with`` block.

    Raises:
        UpcycleError: as :class:`Table`.
    """
    table = Table(path, kind)
    try:
        yield table
    finally:
        table.close()


class _Typed:
    """Stands for a value that is not text; ``name`` is the type of its column, ``lists`` whether it holds lists."""

    def __init__(self, name: str, lists: bool) -> None:
        self.name, self.lists = name, lists


def type_name(value: Any) -> str:
    """Return the type of a value, as a file or Python calls it."""
    return value.name if isinstance(value, _Typed) else type(value).__name__


def holds_list(value: Any) -> bool:
    """Return whether a value, or that of a column, is a list."""
    return isinstance(value, list) or (isinstance(value, _Typed) and value.lists)


def _sample(kind: Any) -> Any:
    import pyarrow

    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(inner) in _STRINGS:
        return ""
    lists = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    # Old files hold conversations as a list of roles beside a list of texts.
    lists = lists or (
        pyarrow.types.is_struct(kind)
        and kind.num_fields > 1
        and all(pyarrow.types.is_list(field.type) for field in kind)
    )
    return _Typed(str(kind), lists)
