"""Contiguous split: neurons in their stored order, cut into equal slices."""

from __future__ import annotations

import torch

from upcycle.ffn.activations import Activations
from upcycle.ffn.feed_forward import FeedForward
from upcycle.methods.base import Partition, balanced_blocks


class ContiguousSplit(Partition):
    """The slices that FactorLLM uses (arXiv 2408.11855); also the fastest split to write, because nothing is gathered."""

    name = "contiguous_split"
    title = "Contiguous split"
    paper = "https://arxiv.org/abs/2408.11855"

    def labels(
        self,
        neurons: torch.Tensor,
        experts: int,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Cut the stored order into slices of equal size."""
        return balanced_blocks(len(neurons), experts)

    def shared_neurons(
        self, count: int, ffn: FeedForward, rng: torch.Generator, activations: Activations | None
    ) -> torch.Tensor:
        """Return the first neurons: this method looks at neither weights nor text."""
        return torch.arange(count)
