"""Opens data files as bytes, unpacking those that are compressed with gzip or Zstandard."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, cast

from upcycle.errors import EnvironmentFault, UsageError

ENDINGS = (".gz", ".zst")
UNPACKED = 4  # times larger than its file: what text usually is, for dividing work alone
_BLOCK = 1 << 20


def is_compressed(path: Path) -> bool:
    """Return whether a file's ending says that it is compressed in a way that is read here."""
    return path.suffix.lower() in ENDINGS


def inner_ending(path: Path) -> str:
    """Return the ending, in lower case, of what a file holds: ``.jsonl`` of ``a.jsonl`` and of ``a.jsonl.gz``."""
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file's unpacked bytes for the ``with`` block.

    Raises:
        EnvironmentFault: reading it needs the pyarrow package, which is missing.
        UsageError: it is damaged, or cut off.
        OSError: it cannot be opened or read.
    """
    if not is_compressed(path):
        with path.open("rb") as file:
            yield file
        return
    with path.open("rb") as packed:
        try:
            if path.suffix.lower() == ".gz":
                with gzip.open(packed) as unpacked:
                    yield cast("IO[bytes]", unpacked)
                return
            try:
                import pyarrow
            except ImportError:
                raise EnvironmentFault(
                    f"reading {path} needs the pyarrow package", hint="pip install 'upcycle[train]'"
                ) from None
            # An empty file is no frame, and pyarrow reads it as one without content.
            stream = pyarrow.CompressedInputStream(packed, "zstd")
            try:
                yield io.BufferedReader(cast("io.RawIOBase", stream), _BLOCK)
            except OSError as error:  # pyarrow has no error of its own for damage
                raise UsageError(f"{path} is damaged or cut off: {error}", hint="copy or download it again") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UsageError(f"{path} is damaged or cut off: {error}", hint="copy or download it again") from None


@lru_cache(maxsize=256)
def lines_before(path: Path, start: int) -> int:
    """Return how many lines begin before the first one that begins at byte ``start`` or behind it."""
    if not start:
        return 0
    lines, left = 1, start - 1  # the line that holds the byte before ``start`` is the last of them
    with path.open("rb") as file:
        while left and (block := file.read(min(_BLOCK, left))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines
