"""Experts that add no mean over the hidden dimension to the stream: means are taken off their down projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from upcycle.ffn.gated_experts import BuildsParts
    from upcycle.ffn.moe_shape import Part


@dataclass(frozen=True)
class CentredExperts:
    """The pieces of a layer's experts, of which those that add to the stream lose their mean.

    A down projection ``[d, m]`` loses the mean of each column, its bias ``[d]`` its mean: fitted ones, too, so that a fit to the dense
    outputs becomes one to their deviations from their means. Computed in fp64, and rounded once.
    """

    tensors: BuildsParts

    def part(self, part: Part) -> torch.Tensor:
        """Build one piece."""
        piece = self.tensors.part(part)
        if not part.kind.endswith(("down", "down_bias")):
            return piece
        wide = piece.double()
        return (wide - wide.mean(0)).to(piece.dtype)
