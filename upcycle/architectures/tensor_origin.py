"""Where an output tensor comes from: a stored tensor, or some of its rows, in another order, added to or multiplied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Order = Literal["halves", "pairs"]


@dataclass(frozen=True)
class Origin:
    """A tensor of the converted model, in terms of the checkpoint.

    ``rows`` are first row and count of a part of ``name`` (None: all of it). ``order`` puts the rows of every attention
    head of ``head`` rows, stored in the other order, into ``halves`` (a rotation turns row i with row i + head/2, as in
    Llama) or ``pairs`` (2i with 2i + 1). ``add`` is added to every element: norms stored as ``w`` and applied as
    ``1 + w``; ``times`` multiplies it: embeddings of a model that multiplies them, for one that does not. What comes of
    half precision is kept in fp32, where the sum does not round, nor the product more than in the model itself.
    """

    name: str
    rows: tuple[int, int] | None = None
    order: Order | None = None
    head: int = 1
    add: float = 0.0
    times: float = 1.0

    def ordered(self, order: Order, head: int) -> Origin:
        """The same origin with its rows put into ``order``; an order and its inverse cancel out."""
        if self.order is None:
            return replace(self, order=order, head=head)
        assert self.order != order, "rows are in this order already"
        return replace(self, order=None, head=1)

    def dtype(self, dtype: str) -> str:
        """The dtype that the tensor is written in where the recipe says ``dtype``."""
        return "float32" if self.add or self.times != 1 else dtype

    def apply(self, block: torch.Tensor) -> torch.Tensor:
        """The origin's rows from the stored ones, for a block of whole heads; fp32 where they are added to or multiplied."""
        if self.order:
            inner = (self.head // 2, 2) if self.order == "halves" else (2, self.head // 2)
            heads = block.reshape(-1, *inner, *block.shape[1:])
            block = heads.transpose(1, 2).reshape(block.shape)
        block = block.float() * self.times if self.times != 1 else block
        return block.float() + self.add if self.add else block


def is_rotated(name: str) -> bool:
    """Whether the rows of a tensor are dimensions that the rotary embedding turns."""
    return name.rsplit(".", 2)[-2] in ("q_proj", "k_proj", "q_norm", "k_norm")
