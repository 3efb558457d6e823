"""The table of tiles: what is chosen, what is committed, what a user's file may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from upcycle.errors import UsageError
from upcycle.kernels.gpu import tile_table
from upcycle.kernels.gpu.compile_gate.candidates import candidates
from upcycle.kernels.gpu.tile_table import (
    GPU_KINDS,
    KERNEL_FAMILIES,
    SIZES,
    Tile,
    TileTable,
    default_table,
    gpu_kind,
    load_table,
)

SMALL = Tile(16, 32, 64, 8, 4, 3)


def table_of(*buckets: int) -> TileTable:
    return TileTable({("sm80", 2, "gemm", rows): Tile(rows, 32, 64, 8, 4, 3) for rows in buckets})


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, 16), (1, 16), (16, 16), (17, 64), (64, 64), (65, 128), (100_000, 128)]
)
def test_the_smallest_bucket_that_holds_the_rows(rows: int, expected: int) -> None:
    assert table_of(128, 16, 64).find("sm80", 2, "gemm", rows).m == expected


@pytest.mark.parametrize("place", [("sm90", 2, "gemm"), ("sm80", 4, "gemm"), ("sm80", 2, "combine")])
def test_missing(place: tuple[str, int, str]) -> None:
    with pytest.raises(UsageError, match="no tile for") as raised:
        table_of(16).find(*place, 16)
    assert "tune-kernels" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("capability", "kind"),
    [((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm100"), ((10, 3), "sm100"), ((12, 0), "sm80")],
)
def test_kinds(capability: tuple[int, int], kind: str) -> None:
    assert gpu_kind(capability) == kind


def test_the_committed_table_has_every_place() -> None:
    table = default_table()
    expected = {
        (kind, size, family, rows)
        for kind in GPU_KINDS
        for size in SIZES
        for family in KERNEL_FAMILIES
        for rows in candidates(size, family)
    }
    assert set(table) == expected


def test_the_committed_table_is_one_of_the_candidates() -> None:
    table = default_table()
    for (_, size, family, rows), tile in table.entries.items():
        assert tile in candidates(size, family)[rows]


def test_one_row_tile_for_all_kernels_that_share_the_list() -> None:
    table = default_table()
    for kind in GPU_KINDS:
        for size in SIZES:
            for rows in (1, 16, 17, 40, 100, 1000):
                names = [name for name in KERNEL_FAMILIES if name not in ("weight_gradient", "combine")]
                assert len({table.find(kind, size, name, rows).m for name in names}) == 1


def test_saved_and_read(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    default_table().save(path)
    assert load_table(path).entries == default_table().entries
    assert "[16, " in path.read_text()


def test_the_file_of_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.json"
    table_of(32).save(path)
    monkeypatch.setenv("UPCYCLE_TILES", str(path))
    assert default_table().entries == table_of(32).entries


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a table of tiles"),
        ("[]", "is not a table of tiles"),
        ({"sm70": {"2": {"gemm": {"16": SMALL.as_list()}}}}, "sm70 2 gemm 16: no such place"),
        ({"sm80": {"2": {"gem": {"16": SMALL.as_list()}}}}, "no such place"),
        ({"sm80": {"2": {"gemm": {"20": SMALL.as_list()}}}}, "no such place"),
        ({"sm80": {"2": {"gemm": {"16": [16, 32]}}}}, "is not"),
        ({"sm80": {"2": {"gemm": {"16": [16, 32, 64, 8, 4, 2.5]}}}}, "is not"),
        ({"sm80": {"2": {"gemm": {"16": [16, 33, 64, 8, 4, 3]}}}}, "cannot be a tile"),
        ({"sm80": {"2": {"gemm": {"16": [16, 32, 64, 8, 3, 3]}}}}, "cannot be a tile"),
        ({"sm80": {"2": {"gemm": {"16": [32, 32, 64, 8, 4, 3]}}}}, "m is 32"),
    ],
)
def test_bad_files(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError, match=message) as raised:
        load_table(path)
    assert "bad.json" in raised.value.message


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.json"):
        load_table(tmp_path / "nowhere.json")


def test_the_committed_file_is_as_save_writes_it(tmp_path: Path) -> None:
    committed = Path(tile_table.__file__).with_name("tiles.json")
    default_table().save(tmp_path / "again.json")
    assert committed.read_text() == (tmp_path / "again.json").read_text()
