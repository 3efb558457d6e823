"""Describes where an output tensor comes from: a stored tensor or some of its rows, perhaps reordered, shifted or scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Origin:
    """Describes a tensor of the converted model in terms of the checkpoint.

    A sum or product of half-precision numbers is kept in fp32, where the sum does not round, and the product rounds no more
    than in the model itself.

    Attributes:
        name: the stored tensor.
        rows: first row and number of rows of the part that is taken; None: all of it.
        order: the rows that are taken of every group of ``head`` rows, in that order: of every attention head, one of :func:`halves`
            and :func:`pairs`, or several orders, one after another; None: all, as they are.
        head: rows of one such group.
        add: added to every element, for norms that are stored as ``w`` and applied as ``1 + w``.
        times: multiplies every element, for embeddings that the source multiplies and the target does not.
        centred: whether the mean of every row is taken off (``rows``), or of every column in each group of ``head`` rows.
        filled: shape and value of a tensor of equal numbers that the source does not store: a norm without a weight, a bias that
            is not there. ``name`` then is a stored tensor whose dtype it is written in.
    """

    name: str
    rows: tuple[int, int] | None = None
    order: tuple[int, ...] | None = None
    head: int = 1
    add: float = 0.0
    times: float = 1.0
    centred: Literal["rows", "columns"] | None = None
    filled: tuple[tuple[int, ...], float] | None = None

    def ordered(self, order: Sequence[int]) -> Origin:
        """Return the same origin with the rows of every head put into ``order`` at last; an order and its inverse cancel out."""
        places, head = (
            (tuple(order), len(order)) if self.order is None else (tuple(self.order[i] for i in order), self.head)
        )
        if places == tuple(range(head)):
            return replace(self, order=None, head=1)
        return replace(self, order=places, head=head)

    def dtype(self, dtype: str) -> str:
        """Return the dtype in which the tensor is written where the recipe says ``dtype``."""
        return "float32" if self.add or self.times != 1 or self.centred else dtype

    def apply(self, block: torch.Tensor) -> torch.Tensor:
        """Return the origin's rows for a block of stored rows of whole heads; fp32 where they are changed."""
        if self.order:
            block = block.unflatten(0, (-1, self.head))[:, list(self.order)].flatten(0, 1)
        if self.centred:
            wide = block.double().unflatten(0, (-1, 1 if self.centred == "rows" else self.head))
            means = wide.mean(-1 if self.centred == "rows" else 1, keepdim=True)
            block = (wide - means).flatten(0, 1).float()
        block = block.float() * self.times if self.times != 1 else block
        return block.float() + self.add if self.add else block


def halves(head: int, rotated: int | None = None) -> tuple[int, ...]:
    """Return the order that makes rows of which 2i and 2i + 1 are turned together those of which i and i + rotated/2 are (Llama's).

    Args:
        head: rows of one head.
        rotated: how many of them are turned, the first ones; None: all.
    """
    turned = head if rotated is None else rotated
    return (*range(0, turned, 2), *range(1, turned, 2), *range(turned, head))


def pairs(head: int, rotated: int | None = None) -> tuple[int, ...]:
    """Return the order that undoes :func:`halves`."""
    turned = head if rotated is None else rotated
    return (*(i // 2 + i % 2 * (turned // 2) for i in range(turned)), *range(turned, head))


def is_rotated(name: str) -> bool:
    """Return whether the rows of a tensor are dimensions that the rotary embedding turns."""
    return name.rsplit(".", 2)[-2] in ("q_proj", "k_proj", "q_norm", "k_norm")
