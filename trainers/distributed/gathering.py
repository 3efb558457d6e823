"""Weights that ZeRO-3 divides among ranks: their whole shape, and their whole value for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def shape_of(weight: torch.Tensor) -> tuple[int, ...]:
    """The whole weight's shape, wherever its parts are."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


@contextmanager
def gathered(weight: torch.Tensor, modifier: int | None = None) -> Iterator[None]:
    """Within this block, a weight that ZeRO-3 divides is whole on every rank. All ranks must enter it together.

    Args:
        weight: any weight; others are left alone.
        modifier: the rank that changes it, if one does: every rank keeps its part of what that rank has at the end.
    """
    if not hasattr(weight, "ds_id"):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([weight], modifier_rank=modifier):
        yield
