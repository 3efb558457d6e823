"""Huge pages are asked for whole ones inside large tensors only."""

from __future__ import annotations

import ctypes

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
    large, small = torch.empty(3 * 2**20), torch.empty(2**20 - 1)
    assert huge_pages.advised(large) is large
    assert huge_pages.advised(small) is small
    assert huge_pages.advised(torch.empty(2**40, device="meta")).is_meta
    ((start, size),) = asked
    assert start % huge_pages.PAGE == size % huge_pages.PAGE == 0
    assert large.data_ptr() <= start < large.data_ptr() + huge_pages.PAGE
    assert start + size <= large.data_ptr() + large.nbytes < start + size + huge_pages.PAGE


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
