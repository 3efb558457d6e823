"""Reads the text columns of Parquet files, row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upcycle.errors import EnvironmentFault, UsageError

_ROWS = 256  # rows that are in memory at a time
_STRINGS = frozenset(["string", "large_string", "string_view"])


def open_parquet(path: Path) -> Any:
    """Open a file as ``pyarrow.parquet.ParquetFile``.

    Raises:
        EnvironmentFault: the pyarrow package is missing.
        UsageError: the file is not a Parquet file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise EnvironmentFault(
            f"reading {path} needs the pyarrow package", hint="pip install 'upcycle[train]'"
        ) from None
    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None


def parquet_columns(path: Path) -> dict[str, Any]:
    """Return, for each column, an empty string where it holds text (also dictionary-encoded), and otherwise its type."""
    with open_parquet(path) as file:
        return {field.name: "" if _is_text(field.type) else _Typed(str(field.type)) for field in file.schema_arrow}


def parquet_texts(path: Path, column: str, groups: range) -> Iterator[str | None]:
    """Yield a column's texts in some row groups, in order.

    Raises:
        UsageError: the column is missing or holds no text, or the file is damaged.
    """
    import pyarrow

    with open_parquet(path) as file:
        chosen = [group for group in groups if group < file.num_row_groups]
        try:
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=chosen, columns=[column]):
                yield from batch.column(0).to_pylist()
        except (pyarrow.ArrowInvalid, pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


class _Typed:
    """Stands for a value that is not text; ``name`` is the type of its column."""

    def __init__(self, name: str) -> None:
        self.name = name


def type_name(value: Any) -> str:
    """Return the type of a value, as a Parquet file or Python calls it."""
    return value.name if isinstance(value, _Typed) else type(value).__name__


def _is_text(kind: Any) -> bool:
    import pyarrow

    inner = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return str(inner) in _STRINGS
