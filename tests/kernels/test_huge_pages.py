"""Huge pages are asked for whole ones inside large tensors only."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from upcycle.kernels import huge_pages


def test_whole_pages_inside_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def advise(start: ctypes.c_void_p, size: ctypes.c_size_t, advice: int) -> int:
        assert advice == 14
        asked.append((start.value or 0, size.value))
        return 0

    monkeypatch.setattr(huge_pages, "_madvise", lambda: advise)
    monkeypatch.setattr(huge_pages, "_free", lambda: 12)
    large, small = torch.empty(3 * 2**20), torch.empty(2**20 - 1)
    assert huge_pages.advised(large) is large
    assert huge_pages.advised(small) is small
    assert huge_pages.advised(torch.empty(2**22, device="meta")).is_meta
    huge_pages.advised(torch.empty(huge_pages.MOST + 1, dtype=torch.uint8))
    ((start, size),) = asked
    assert start % huge_pages.PAGE == size % huge_pages.PAGE == 0
    assert large.data_ptr() <= start < large.data_ptr() + huge_pages.PAGE
    assert start + size <= large.data_ptr() + large.nbytes < start + size + huge_pages.PAGE


def test_no_more_than_half_of_what_is_free_in_one_piece(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []
    zones = tmp_path / "buddyinfo"
    zones.write_text(
        "Node 0, zone      DMA      3      1      1      1      3      3      3      1      1      2      0 \n"
        "Node 0, zone   Normal  51730   2209   3143   2067    954    359    148     50     22      4      3 \n"
    )
    monkeypatch.setattr(huge_pages, "_FREE", zones)
    assert huge_pages._free() == 4 + 2 * 3
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda start, size, advice: asked.append(size.value))
    huge_pages.advised(torch.empty(7 * huge_pages.PAGE, dtype=torch.uint8))
    assert not asked
    huge_pages.advised(torch.empty(5 * huge_pages.PAGE, dtype=torch.uint8))
    assert len(asked) == 1
    zones.write_text(zones.read_text().splitlines()[0])
    assert huge_pages._free() == 2
    zones.unlink()
    assert huge_pages._free() == 0


def test_the_system_takes_the_advice() -> None:
    tensor = huge_pages.advised(torch.empty(2**24)).fill_(1.0)
    assert bool((tensor == 1).all())


def test_elsewhere_and_where_torch_asks_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    huge_pages._madvise.cache_clear()
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    assert huge_pages._madvise() is None
    huge_pages._madvise.cache_clear()
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    monkeypatch.setattr("sys.platform", "darwin")
    assert huge_pages._madvise() is None
    huge_pages._madvise.cache_clear()
