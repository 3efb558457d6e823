"""Large new tensors on a CPU, in huge pages where Linux offers them: the first write to memory costs as much as a small product.

Linux gives memory page by page when it is first written to, and clears every page: half a million times for 2 GB of gradients in
pages of 4 KB, a thousand times in pages of 2 MB. Elsewhere, and where huge pages are off, nothing changes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache

import torch

PAGE = 2 * 2**20
LEAST = 2 * PAGE  # bytes of a tensor that surely has a whole huge page in it
MADV_HUGEPAGE = 14


def advised(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, new and on the CPU, its whole huge pages asked for as such."""
    size = tensor.numel() * tensor.element_size()
    if size >= LEAST and tensor.device.type == "cpu":
        advise = _madvise()
        start = tensor.data_ptr()
        first, last = -(-start // PAGE) * PAGE, (start + size) // PAGE * PAGE
        if advise is not None:
            advise(
                ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_HUGEPAGE
            )  # advice: refusals do not matter
    return tensor


@lru_cache
def _madvise() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux") or os.environ.get("THP_MEM_ALLOC_ENABLE") == "1":  # torch does it itself
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
