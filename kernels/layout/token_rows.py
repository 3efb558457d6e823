"""Rows of a group of experts where they lie, among the tokens of a pass. T tokens, n rows of the group, H hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass
class TokenRows:
    """Rows that are copied to one place only where something asks for them there: a kernel may read them by their numbers."""

    tokens: torch.Tensor
    """``[T, H]``, in the model's dtype."""
    index: torch.Tensor
    """int32 ``[n]``, contiguous: the token of every row."""
    counts: tuple[int, ...]
    """How many rows each expert has."""
    gather: Callable[[], torch.Tensor]
    """Makes ``[n, H]`` in the accumulator's dtype."""

    @cached_property
    def together(self) -> torch.Tensor:
        """``[n, H]`` in the accumulator's dtype."""
        return self.gather()

    def parts(self) -> Sequence[torch.Tensor]:
        """The rows of each expert, parts of one matrix."""
        parts: Sequence[torch.Tensor] = self.together.split(self.counts)
        return parts


def parts_of(rows: TokenRows | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The rows of each expert, in one place."""
    return rows.parts() if isinstance(rows, TokenRows) else rows
