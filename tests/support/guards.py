"""Buffers filled with NaN between bands of NaN, which show what a kernel forgets to write or writes outside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

BAND = 1024
_PATTERN = 0x7FC1  # every 16 bits: a NaN that no computation gives


class Guards:
    """The guarded buffers of one :func:`guarded` block."""

    def __init__(self) -> None:
        self.bands: list[torch.Tensor] = []

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor of NaN inside a larger one of NaN."""
        size = math.prod(shape)
        words = torch.full((size * dtype.itemsize // 2 + 2 * BAND,), _PATTERN, dtype=torch.int16, device=device)
        self.bands += [words[:BAND], words[len(words) - BAND :]]
        return words[BAND : len(words) - BAND].view(dtype).view(shape)

    def check(self) -> None:
        """Check that nothing was written outside a buffer.

        Raises:
            AssertionError: something was.
        """
        assert self.bands, "no buffer was guarded"
        for band in self.bands:
            assert bool((band == _PATTERN).all()), "a kernel wrote outside its output"


@contextmanager
def guarded() -> Iterator[Guards]:
    """Guard every tensor that is made while the block lasts, by replacing torch's ``new_empty`` and ``empty_like``."""
    guards = Guards()
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def guarded_new(self: torch.Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> torch.Tensor:
        shape = tuple(size[0]) if size and isinstance(size[0], (tuple, list, torch.Size)) else tuple(size)
        return guards.buffer(shape, dtype or self.dtype, self.device)

    def guarded_like(tensor: torch.Tensor, **rest: Any) -> torch.Tensor:
        return guards.buffer(tuple(tensor.shape), tensor.dtype, tensor.device)

    torch.Tensor.new_empty, torch.empty_like = guarded_new, guarded_like  # type: ignore[method-assign, assignment]
    try:
        yield guards
    finally:
        torch.Tensor.new_empty, torch.empty_like = new_empty, empty_like  # type: ignore[method-assign]
