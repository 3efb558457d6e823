"""Memory of tensors on a CPU that is reused after they are gone.

Linux clears the memory a process asks for page by page, when it is first written to: for the gradients of many small experts that
takes as long as computing them. The C library, which torch asks, gives large blocks back at once, and asks again.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Sequence
from math import prod

import torch

from upcycle.kernels.layout.plain_memory import is_plain

LEAST = 2**17  # bytes: smaller blocks the C library keeps itself
MOST = 512 * 2**20  # bytes that wait for reuse, in all; what has waited longest is given back first


class Recycler:
    """Blocks of memory that wait for reuse, the newest last. Every tensor has a block of its own; threads may share a recycler."""

    def __init__(self) -> None:
        """Start with no block waiting."""
        self._waiting: list[mmap.mmap] = []
        self._lock = threading.RLock()  # a tensor may end, by garbage collection, while another is made

    @property
    def waiting(self) -> int:
        """Bytes that wait for reuse."""
        with self._lock:
            return sum(map(len, self._waiting))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous tensor on the CPU."""
        count = prod(shape)
        size = _rounded(count * dtype.itemsize)
        if not LEAST <= size <= MOST or not hasattr(mmap, "MAP_ANONYMOUS"):
            return torch.empty(shape, dtype=dtype)
        try:  # not shared: a process that is forked off gets a copy
            block = self._take(size) or mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # there is no memory left but what waits
            self.clear()
            return torch.empty(shape, dtype=dtype)
        view = memoryview(block)  # held by the tensor's storage, and by nobody else
        weakref.finalize(view, self._put, block).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=count).view(shape)

    def clear(self) -> None:
        """Give all waiting blocks back to the system."""
        with self._lock:
            self._waiting.clear()

    def _take(self, size: int) -> mmap.mmap | None:
        with self._lock:
            for block in reversed(tuple(self._waiting)):
                if len(block) == size:
                    try:
                        self._waiting.remove(block)
                    except ValueError:  # garbage collection came in between, and it was the oldest of too many
                        continue
                    return block
        return None

    def _put(self, block: mmap.mmap) -> None:
        with self._lock:
            self._waiting.append(block)
            excess = sum(map(len, self._waiting)) - MOST
            while excess > 0:
                excess -= len(self._waiting.pop(0))


RECYCLER = Recycler()


def recycled(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """An uninitialised tensor as ``tensor.new_empty(shape)`` gives it; on a CPU, in memory that an earlier tensor left, if any."""
    return RECYCLER.empty(shape, tensor.dtype) if is_plain(tensor) else tensor.new_empty(shape)


def recycled_like(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor as ``torch.empty_like(tensor)`` gives it, with :func:`recycled` memory if ``tensor`` is contiguous."""
    return recycled(tensor, *tensor.shape) if tensor.is_contiguous() else torch.empty_like(tensor)


def _rounded(size: int) -> int:
    """``size`` rounded up to a multiple of an eighth of the power of two below it: batches differ a little in their rows."""
    step = max(mmap.PAGESIZE, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
