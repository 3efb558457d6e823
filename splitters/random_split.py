"""Random split: a seeded random partition of the neurons."""

from __future__ import annotations

import torch

from upcycle.ffn.activations import Activations
from upcycle.ffn.feed_forward import FeedForward
from upcycle.methods.base import Partition, balanced_blocks


class RandomSplit(Partition):
    """LLaMA-MoE's "Independent (Random)" (arXiv 2406.16554, section 3): the baseline every clustering must beat."""

    name = "random_split"
    title = "Random split"
    paper = "https://arxiv.org/abs/2406.16554"

    def labels(
        self,
        neurons: torch.Tensor,
        experts: int,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Deal the neurons out in random order, another one in every layer."""
        return balanced_blocks(len(neurons), experts)[torch.randperm(len(neurons), generator=rng)]
