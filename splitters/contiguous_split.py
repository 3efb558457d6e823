"""Contiguous split: neurons in their stored order, cut into equal slices."""

from __future__ import annotations

import torch

from upcycle.feed_forward import FeedForward
from upcycle.methods.base import Partition


class ContiguousSplit(Partition):
    """The slices FactorLLM uses (arXiv 2408.11855); also the fastest to write, since nothing is gathered."""

    name = "contiguous_split"
    title = "Contiguous split"
    paper = "https://arxiv.org/abs/2408.11855"

    def order(self, size: int, ffn: FeedForward, rng: torch.Generator) -> torch.Tensor:
        """The stored order."""
        return torch.arange(size)
