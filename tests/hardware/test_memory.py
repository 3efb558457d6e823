"""Freed memory stays with the process. In processes of their own: the setting cannot be taken back."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable

import pytest

from upcycle.hardware import memory

PROGRAM = """
import sys
import torch
from upcycle.hardware.memory import keep_freed_memory, reuse_freed_memory, unmap_large_blocks
if sys.argv[1] == "kept":
    assert keep_freed_memory()
if sys.argv[1] == "reused":
    assert reuse_freed_memory(2**27)
if sys.argv[1] == "unmapped":
    assert unmap_large_blocks()
torch.empty(24 * 2**20, dtype=torch.uint8)  # freed at once: from then on, glibc keeps blocks of this size
block = torch.empty(int(sys.argv[2]) * 2**20, dtype=torch.uint8)
begin, end = next(line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]"))
print(int(begin, 16) <= block.data_ptr() < int(end, 16))
"""


def in_the_heap(how: str, mebibytes: int = 64) -> str:
    """Whether a large block lies in the heap, which stays, or in a mapping of its own, which goes with it."""
    command = [sys.executable, "-P", "-c", PROGRAM, how, str(mebibytes)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.long
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's settings")
def test_large_blocks_lie_in_the_heap() -> None:
    assert in_the_heap("kept") == "True"
    assert in_the_heap("reused") == "True"
    assert in_the_heap("given back") == "False"
    assert in_the_heap("given back", 20) == "True"
    assert in_the_heap("unmapped", 20) == "False"


@pytest.mark.parametrize(
    "setting", [memory.keep_freed_memory, lambda: memory.reuse_freed_memory(2**20), memory.unmap_large_blocks]
)
def test_other_c_libraries_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, setting: Callable[[], bool]) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert not setting()


def test_nothing_is_set_where_address_space_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    if not hasattr(psutil, "RLIMIT_AS"):
        pytest.skip("psutil knows of no such limit here")
    monkeypatch.setattr(psutil.Process, "rlimit", lambda *_: (2**33, psutil.RLIM_INFINITY))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: pytest.fail("glibc was asked"))
    assert not memory.reuse_freed_memory(2**20)


def test_the_peak_is_at_least_what_is_in_use() -> None:
    import psutil

    assert memory.peak_memory() >= 0.9 * psutil.Process().memory_info().rss
