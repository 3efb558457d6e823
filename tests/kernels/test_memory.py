"""Large pages: the advice is given for whole pages of large tensors only, and nothing depends on its being taken."""

from __future__ import annotations

import mmap

import pytest
import torch

from upcycle.kernels import memory


def test_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int, int]] = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *arguments: given.append(arguments) or -1)
    small, large = torch.empty(2**10), torch.empty(2**21)
    assert memory.on_large_pages(small) is small
    assert not given
    assert memory.on_large_pages(large) is large
    ((start, length, _),) = given
    end = large.data_ptr() + 4 * 2**21
    assert large.data_ptr() <= start < large.data_ptr() + mmap.PAGESIZE
    assert end - mmap.PAGESIZE < start + length <= end
    assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0


def test_without_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert memory.empty(2**11, 2**10, like=torch.empty(0, dtype=torch.bfloat16)).shape == (2**11, 2**10)


def test_the_real_call() -> None:
    made = memory.empty(2**21, like=torch.empty(0))
    assert made.fill_(3).sum() == 3 * 2**21
