"""Large new tensors on a CPU, in huge pages where Linux has them at hand: the first write to memory costs as much as a small product.

Linux gives memory page by page when it is first written to, and clears every page: half a million times for 2 GB of gradients in
pages of 4 KB, a thousand times in pages of 2 MB. Where it would first have to move others' pages together, that takes longer
than it saves, and nothing is asked for. Elsewhere, and where huge pages are off, nothing changes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

import torch

PAGE = 2 * 2**20
LEAST = 2 * PAGE  # bytes of a tensor that surely has a whole huge page in it
# Of larger ones the pages that lie free run out, and those that a virtual machine's host has taken back cost more than small ones.
MOST = 64 * 2**20
SHARE = 2  # one in so many of the huge pages that are free, at most
MADV_HUGEPAGE = 14
_ORDER = 9  # a huge page is 2^9 small ones
_FREE = Path("/proc/buddyinfo")


def advised(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, new and on the CPU, its whole huge pages asked for as such."""
    size = tensor.numel() * tensor.element_size()
    if LEAST <= size <= MOST and tensor.device.type == "cpu":
        advise = _madvise()
        start = tensor.data_ptr()
        first, last = -(-start // PAGE) * PAGE, (start + size) // PAGE * PAGE
        if advise is not None and SHARE * (last - first) <= PAGE * _free():
            advise(
                ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_HUGEPAGE
            )  # advice: refusals do not matter
    return tensor


def _free() -> int:
    """How many huge pages lie free in one piece; a line per zone counts the free blocks of 1, 2, 4 ... pages.

    Zones for devices (DMA) are the last that memory is taken from; a machine may have no other.
    """
    try:
        zones = [line.split()[3:] for line in _FREE.read_text(encoding="ascii").splitlines()]
    except OSError:
        return 0
    usual = [zone for zone in zones if not zone[0].startswith("DMA")] or zones
    return sum(int(count) << order for _, *counts in usual for order, count in enumerate(counts[_ORDER:]))


@lru_cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux") or os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":  # torch does it itself
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
