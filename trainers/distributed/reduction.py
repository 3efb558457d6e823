"""Sums over the tokens that count, and their totals over the passes and ranks that share a global batch.

T tokens, B sequences of S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from upcycle.errors import UsageError


class NamedSums(Protocol):
    """The sums of one loss of one layer over one pass."""

    @property
    def name(self) -> str:
        """The loss's name."""
        ...

    @property
    def sums(self) -> torch.Tensor:
        """``[n]``, each a sum over tokens."""
        ...


class Reduction:
    """Adds tensors up over the data-parallel ranks, so that every rank computes the same global loss.

    The gradient of a total is ``ranks`` times that of the local sum. Data-parallel training averages gradients over ranks, and
    this makes their average the gradient of the whole batch's loss, even if ranks have different numbers of tokens.
    """

    def __init__(self, add: Callable[[torch.Tensor], torch.Tensor] | None = None, ranks: int = 1) -> None:
        """``add`` returns, on every rank, the elementwise sum of a tensor over ``ranks`` ranks; ``None``: there is one rank."""
        self.add, self.ranks = add, ranks

    def total(self, local: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks; same shape and dtype."""
        if self.add is None:
            return local
        return self.add(local.detach().clone()) + self.ranks * (local - local.detach())

    def totals(self, terms: Sequence[NamedSums]) -> Sequence[torch.Tensor]:
        """Every term's sums over all ranks, ``[n]`` each, in one exchange for all of them."""
        sizes = [len(term.sums) for term in terms]
        totals: tuple[torch.Tensor, ...] = self.total(torch.cat([term.sums for term in terms])).split(sizes)
        return totals


ALONE = Reduction()  # for a single rank: totals are the sums themselves


def counted(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The sum of ``values`` ``[T, ...]`` over the tokens where ``mask`` (bool, T in all; ``None``: all) is true: ``[...]``.

    Raises:
        UsageError: the mask has another number of tokens.
    """
    return values.sum(0) if mask is None else (values * _flat(mask, values)).sum(0)


def counted_by_sequence(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The same sum for each sequence of ``mask`` ``[B, S]``: ``[B, ...]``.

    Raises:
        UsageError: there is no mask to show where sequences begin, or it has another number of tokens.
    """
    if mask is None:
        raise UsageError("a sequence-level loss needs a mask [B, S]", hint="give ones where every token counts")
    return (values * _flat(mask, values)).view(*mask.shape, *values.shape[1:]).sum(1)


def token_count(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """How many tokens of ``values`` ``[T, ...]`` count: ``[1]`` in its dtype, to be concatenated with other sums."""
    return counted(values.new_ones(len(values), 1), mask)


def _flat(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if mask.numel() != len(values):
        raise UsageError(f"the mask has {mask.numel()} tokens, but {len(values)} were recorded")
    return mask.reshape(-1, *[1] * (values.ndim - 1)).to(values.dtype)
