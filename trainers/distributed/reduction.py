"""Adds sums over tokens up, over the passes and ranks that share a global batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from upcycle.errors import UsageError


class Summed(Protocol):
    """What one pass adds to the sums of one loss of one layer."""

    @property
    def name(self) -> str:
        """The loss's name."""
        ...

    @property
    def sums(self) -> torch.Tensor:
        """``[n]``, additive over tokens."""
        ...


class Reduction:
    """Adds tensors up over the data-parallel ranks, so that every rank computes the same global loss.

    The gradient of a total is ``ranks`` times the local one: data-parallel training averages gradients, and the average of
    those is the gradient of the loss of the whole batch, however unlike the ranks' shares of the tokens are.
    """

    def __init__(self, add: Callable[[torch.Tensor], torch.Tensor] | None = None, ranks: int = 1) -> None:
        """``add`` returns the elementwise sum of a tensor over ``ranks`` ranks, on each of them."""
        self.add, self.ranks = add, ranks

    def total(self, local: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks; same shape and dtype."""
        if self.add is None:
            return local
        return self.add(local.detach().clone()) + self.ranks * (local - local.detach())

    def totals(self, pieces: Sequence[Summed]) -> Sequence[torch.Tensor]:
        """The sums of every piece over all tokens that its loss is of, in one exchange."""
        sizes = [len(piece.sums) for piece in pieces]
        divided: tuple[torch.Tensor, ...] = self.total(torch.cat([piece.sums for piece in pieces])).split(sizes)
        return divided


ALONE = Reduction()


def counted(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The sum of ``[T, ...]`` over the tokens that count.

    Raises:
        UsageError: the mask has another number of tokens.
    """
    return values.sum(0) if mask is None else (values * _flat(mask, values)).sum(0)


def counted_by_sequence(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The same for every sequence apart, ``[B, ...]``.

    Raises:
        UsageError: there is no mask to say what the sequences are, or it has another number of tokens.
    """
    if mask is None:
        raise UsageError("a sequence-level loss needs a mask [B, S]", hint="give ones where every token counts")
    return (values * _flat(mask, values)).view(*mask.shape, *values.shape[1:]).sum(1)


def token_count(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """How many of the tokens of ``[T, ...]`` count, ``[1]`` in its dtype, to be concatenated with other sums."""
    return counted(values.new_ones(len(values), 1), mask)


def _flat(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if mask.numel() != len(values):
        raise UsageError(f"a mask of {mask.numel()} tokens for {len(values)} recorded ones")
    return mask.reshape(-1, *[1] * (values.ndim - 1)).to(values.dtype)
