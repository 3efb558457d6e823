"""Tile sizes: a committed table by kind of GPU and dtype. Shapes alone decide which entry is used; nothing is searched at run time.

``tiles.json`` holds only what the gate (``python -m upcycle.kernels.gpu.compile_gate``) compiled without spills. ``UPCYCLE_TILES``
names another file of the same form, such as ``upcycle tune-kernels`` writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeAlias

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.atomic_files import write_text_whole
from upcycle.files.formats.parsing import read_json

KERNEL_FAMILIES = (
    "up/plain",
    "up/interleaved",
    "up/concatenated",
    "gemm",
    "down_backward",
    "weight_gradient",
    "combine",
)
ROWS_OF_THEIR_OWN = ("weight_gradient", "combine")
"""Families with an ``m`` of their own; all others share the ``m`` of the list of row tiles."""
GPU_KINDS = ("sm80", "sm90", "sm100")
SIZES = (2, 4)  # bytes per element
BUCKETS = (16, 32, 64, 128)
TILES_VARIABLE = "UPCYCLE_TILES"
_FILE = Path(__file__).with_name("tiles.json")
_WARPS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Tile:
    """The work of one program: ``m x n`` results, in steps of depth ``k``."""

    m: int
    n: int
    k: int
    group: int
    """How many row tiles share a column of weights."""
    warps: int
    stages: int

    def as_list(self) -> list[int]:
        """The numbers as the table's file holds them."""
        return [self.m, self.n, self.k, self.group, self.warps, self.stages]


Key: TypeAlias = tuple[str, int, str, int]
"""Kind of GPU, bytes per element, family, bucket of rows per expert."""


@dataclass(frozen=True)
class TileTable:
    """Tiles by kind of GPU, bytes per element, family and bucket of rows per expert."""

    entries: Mapping[Key, Tile]

    def find(self, kind: str, size: int, family: str, rows: int) -> Tile:
        """The tile of the smallest bucket that holds ``rows`` per expert, or of the largest there is.

        Raises:
            UsageError: the table has none, as one that was tuned for another GPU.
        """
        held = self._buckets.get((kind, size, family))
        if held is None:
            raise UsageError(
                f"no tile for {family}, {kind}, {size} bytes per element",
                hint=f"unset {TILES_VARIABLE}, or tune again: upcycle tune-kernels",
            )
        fitting = min((bucket for bucket in held if bucket >= rows), default=max(held))
        return self.entries[kind, size, family, fitting]

    @cached_property
    def _buckets(self) -> dict[tuple[str, int, str], list[int]]:
        # Looked up for every launch: going through all entries took longer than starting a kernel.
        found: dict[tuple[str, int, str], list[int]] = {}
        for kind, size, family, rows in self.entries:
            found.setdefault((kind, size, family), []).append(rows)
        return found

    def __iter__(self) -> Iterator[Key]:
        return iter(self.entries)

    def replaced(self, entries: Mapping[Key, Tile]) -> TileTable:
        """A copy with other tiles in some places."""
        return TileTable({**self.entries, **entries})

    def save(self, path: Path) -> None:
        """Write the table as JSON, one tile a line."""
        content: dict[str, Any] = {}
        for (kind, size, family, rows), tile in self.entries.items():
            content.setdefault(kind, {}).setdefault(str(size), {}).setdefault(family, {})[str(rows)] = tile.as_list()
        text = json.dumps(content, indent=1)
        for tile in self.entries.values():
            spread = "[" + ",".join(f"\n     {number}" for number in tile.as_list()) + "\n    ]"
            text = text.replace(spread, json.dumps(tile.as_list()))
        write_text_whole(path, text + "\n")


def gpu_kind(capability: tuple[int, int]) -> str:
    """The part of the table that a GPU of this compute capability uses.

    Only Hopper and data-centre Blackwell have tiles of their own; all others, consumer Blackwell too, have the instructions
    and at least the shared memory of the first.
    """
    return {9: "sm90", 10: "sm100"}.get(capability[0], "sm80")


def default_table() -> TileTable:
    """The committed table, or the file that ``UPCYCLE_TILES`` names.

    Raises:
        UsageError: that file cannot be used.
    """
    named = os.environ.get(TILES_VARIABLE)
    return load_table(Path(named) if named else _FILE)


@cache
def load_table(path: Path) -> TileTable:
    """The table in a file.

    Raises:
        UsageError: there is no such file, or it does not hold tiles; the message names the place.
    """
    try:
        content = read_json(path)
        listed = [
            ((kind, int(size), family, int(rows)), numbers)
            for kind, sizes in content.items()
            for size, families in sizes.items()
            for family, buckets in families.items()
            for rows, numbers in buckets.items()
        ]
    except (CheckpointError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is not a table of tiles: {error}", hint=f"unset {TILES_VARIABLE}") from None
    return TileTable({key: _tile(path, key, numbers) for key, numbers in listed})


def _tile(path: Path, key: Key, numbers: Any) -> Tile:
    where = f"{path}, {' '.join(map(str, key))}"
    kind, size, family, rows = key
    if kind not in GPU_KINDS or size not in SIZES or family not in KERNEL_FAMILIES or rows not in BUCKETS:
        raise UsageError(f"{where}: no such place in a table of tiles", hint=f"families: {', '.join(KERNEL_FAMILIES)}")
    if not isinstance(numbers, list) or len(numbers) != 6 or not all(type(number) is int for number in numbers):
        raise UsageError(f"{where}: {numbers} is not [m, n, k, group, warps, stages]")
    tile = Tile(*numbers)
    powers = all(number > 0 and number & (number - 1) == 0 for number in (tile.m, tile.n, tile.k))
    if not powers or tile.group < 1 or tile.warps not in _WARPS or not 1 <= tile.stages <= 8:
        raise UsageError(f"{where}: {numbers} cannot be a tile", hint="m, n and k are powers of two, warps 1 to 16")
    if family not in ROWS_OF_THEIR_OWN and tile.m != rows:
        raise UsageError(f"{where}: m is {tile.m}, but the kernels share one list of tiles of {rows} rows")
    return tile
