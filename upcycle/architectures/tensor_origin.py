"""Describes where an output tensor comes from: a stored tensor or some of its rows, perhaps reordered, shifted or scaled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Order = Literal["halves", "pairs"]


@dataclass(frozen=True)
class Origin:
    """Describes a tensor of the converted model in terms of the checkpoint.

    A sum or product of half-precision numbers is kept in fp32, where the sum does not round, and the product rounds no more
    than in the model itself.

    Attributes:
        name: the stored tensor.
        rows: first row and number of rows of the part that is taken; None: all of it.
        order: the order into which the rows of every attention head are put, from the other one: ``halves`` (the rotary embedding
            turns row i with row i + head/2, as in Llama) or ``pairs`` (row 2i with row 2i + 1); None: they stay.
        head: rows of one attention head, or of one group of ``taken``.
        taken: the rows of every group of ``head`` rows that are taken, in that order; empty: all of them, as they are.
        add: added to every element, for norms that are stored as ``w`` and applied as ``1 + w``.
        times: multiplies every element, for embeddings that the source multiplies and the target does not.
        filled: shape and value of a tensor of equal numbers that the source does not store: a norm without a weight, a bias that
            is not there. ``name`` then is a stored tensor whose dtype it is written in.
    """

    name: str
    rows: tuple[int, int] | None = None
    order: Order | None = None
    head: int = 1
    taken: tuple[int, ...] = ()
    add: float = 0.0
    times: float = 1.0
    filled: tuple[tuple[int, ...], float] | None = None

    def ordered(self, order: Order, head: int) -> Origin:
        """Return the same origin with its rows put into ``order``; an order and its inverse cancel out."""
        if self.order is None:
            assert not self.taken, "rows are in an order of their own"
            return replace(self, order=order, head=head)
        assert self.order != order, "rows are in this order already"
        return replace(self, order=None, head=1)

    def rearranged(self, places: tuple[int, ...]) -> Origin:
        """Return the same origin, in whose heads row i is what was row ``places[i]``."""
        assert self.order is None, "rows are in an order that has a name"
        if self.taken:
            return replace(self, taken=tuple(self.taken[place] for place in places))
        return replace(self, taken=places, head=len(places))

    def dtype(self, dtype: str) -> str:
        """Return the dtype in which the tensor is written where the recipe says ``dtype``."""
        return "float32" if self.add or self.times != 1 else dtype

    def apply(self, block: torch.Tensor) -> torch.Tensor:
        """Return the origin's rows for a block of stored rows of whole heads; fp32 where they are shifted or scaled."""
        if self.order:
            inner = (self.head // 2, 2) if self.order == "halves" else (2, self.head // 2)
            heads = block.reshape(-1, *inner, *block.shape[1:])
            block = heads.transpose(1, 2).reshape(block.shape)
        if self.taken:
            block = block.unflatten(0, (-1, self.head))[:, list(self.taken)].flatten(0, 1)
        block = block.float() * self.times if self.times != 1 else block
        return block.float() + self.add if self.add else block


def is_rotated(name: str) -> bool:
    """Return whether the rows of a tensor are dimensions that the rotary embedding turns."""
    return name.rsplit(".", 2)[-2] in ("q_proj", "k_proj", "q_norm", "k_norm")
