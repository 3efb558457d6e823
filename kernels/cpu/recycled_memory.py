"""Memory of tensors on a CPU that is used again after their end.

Linux clears the memory a process asks for page by page, when it is first written to: for the gradients of many small experts that
takes as long as computing them. The C library, which torch asks, gives large pieces back at once, and asks again.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Sequence
from math import prod

import torch

from upcycle.kernels.layout.plain_memory import is_plain

LEAST = 2**17  # bytes: smaller pieces the C library keeps itself
MOST = 512 * 2**20  # bytes that wait to be used again, in all; what is used longest ago goes first


class Recycler:
    """Pieces of memory that wait to be used again, the newest last. Every tensor has a piece of its own; threads may share."""

    def __init__(self) -> None:
        """Without any."""
        self._waiting: list[mmap.mmap] = []
        self._lock = threading.RLock()  # a tensor may end, by garbage collection, while another is made

    @property
    def waiting(self) -> int:
        """Bytes."""
        with self._lock:
            return sum(map(len, self._waiting))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor on the CPU, with whatever its memory held."""
        count = prod(shape)
        size = _rounded(count * dtype.itemsize)
        if not LEAST <= size <= MOST or not hasattr(mmap, "MAP_ANONYMOUS"):
            return torch.empty(shape, dtype=dtype)
        try:  # not shared: a process that is forked off gets a copy
            piece = self._take(size) or mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # there is no memory left but what waits
            self.clear()
            return torch.empty(shape, dtype=dtype)
        view = memoryview(piece)  # held by the tensor's storage, and by nobody else
        weakref.finalize(view, self._put, piece).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=count).view(shape)

    def clear(self) -> None:
        """Give back everything that waits."""
        with self._lock:
            self._waiting.clear()

    def _take(self, size: int) -> mmap.mmap | None:
        with self._lock:
            for piece in reversed(tuple(self._waiting)):
                if len(piece) == size:
                    try:
                        self._waiting.remove(piece)
                    except ValueError:  # garbage collection came in between, and it was the oldest of too many
                        continue
                    return piece
        return None

    def _put(self, piece: mmap.mmap) -> None:
        with self._lock:
            self._waiting.append(piece)
            excess = sum(map(len, self._waiting)) - MOST
            while excess > 0:
                excess -= len(self._waiting.pop(0))


RECYCLER = Recycler()


def recycled(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """Like ``tensor.new_empty(shape)``, on a CPU in memory that an ended tensor left, where there is some."""
    return RECYCLER.empty(shape, tensor.dtype) if is_plain(tensor) else tensor.new_empty(shape)


def recycled_like(tensor: torch.Tensor) -> torch.Tensor:
    """Like ``torch.empty_like(tensor)``; so is one with strides of its own."""
    return recycled(tensor, *tensor.shape) if tensor.is_contiguous() else torch.empty_like(tensor)


def _rounded(size: int) -> int:
    """Up to a multiple of an eighth of the power of two below it: numbers of rows differ a little from batch to batch."""
    step = max(mmap.PAGESIZE, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step
