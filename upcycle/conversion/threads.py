"""Sets how many threads torch uses while a conversion copies blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def torch_threads(count: int) -> Iterator[int]:
    """Let torch use ``count`` threads inside the ``with`` block; yield the number it used before.

    Blocks are copied on one thread: hashing and writing fill the other cores, and torch's idle threads would spin beside them.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
