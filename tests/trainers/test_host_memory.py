"""Freed memory stays with the process. In processes of their own: the setting cannot be taken back."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from upcycle.trainers import host_memory

FEW = 15
PROGRAM = """
import resource, sys
import torch
from upcycle.trainers.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MiB: 16,384 pages of 4 KiB, or 32 large ones
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(how: str) -> int:
    """Page faults of the second time that as much memory is asked for."""
    command = [sys.executable, "-P", "-c", PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's settings")
def test_the_second_step_finds_the_memory_of_the_first() -> None:
    assert faults("kept") < FEW
    assert faults("given back") > 2 * FEW


def test_other_c_libraries_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: object())
    assert not host_memory.keep_freed_memory()
