"""Large results on large pages: memory that is new to the process costs a fault per page, and an expert layer's gradients are
tens of megabytes that are new in every step."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import lru_cache

import torch

LEAST_BYTES = 2**22  # below, allocators reuse memory anyway
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def empty(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """``like.new_empty(shape)``, on large pages where it is large, the system is Linux and allows them on request."""
    return on_large_pages(like.new_empty(shape))


def on_large_pages(fresh: torch.Tensor) -> torch.Tensor:
    """The same tensor, which nobody has written yet."""
    advise = _madvise()
    size = fresh.numel() * fresh.element_size()
    if advise is not None and size >= LEAST_BYTES and fresh.device.type == "cpu" and fresh.is_contiguous():
        first = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (fresh.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(first, last - first, _ADVICE)  # advice: that it is not taken is no error
    return fresh


@lru_cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    if _ADVICE is None or not sys.platform.startswith("linux"):
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
