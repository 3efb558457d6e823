"""Sparse upcycling: every expert is a copy of the dense FFN."""

from __future__ import annotations

import torch

from upcycle.activations import Activations
from upcycle.blueprint import ExpertSpec, LayerBlueprint
from upcycle.errors import UsageError
from upcycle.feed_forward import FeedForward
from upcycle.methods.base import Method, Scale
from upcycle.targets.base import MoeShape


class SparseUpcycling(Method):
    """Komatsuzaki et al., ICLR 2023, arXiv 2212.05055.

    Here the top-k weights are renormalised to sum to 1, which preserves the dense function at any k; the paper's
    language models leave them as they are and start from about k/E of it.
    """

    name = "sparse_upcycling"
    title = "Sparse upcycling"
    paper = "https://arxiv.org/abs/2212.05055"
    kind = "copies"
    exact_with_any_router = True

    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> int:
        """The dense width."""
        if shared:
            raise UsageError(
                "sparse_upcycling has no shared experts: every expert is the whole FFN",
                hint="leave --shared out, or split the FFN with --method random_split",
            )
        return intermediate_size

    def scale(self, convention: Scale, experts: int, top_k: int) -> float:
        """Copies weighted by a sum of 1 need no factor."""
        if convention == "sum":
            raise UsageError(
                "--scale sum would multiply the dense output by top-k: experts that are copies are averaged, not summed",
                hint="use --scale exact",
            )
        return 1.0

    def blueprint(
        self,
        ffn: FeedForward,
        shape: MoeShape,
        scale: float,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> LayerBlueprint:
        """All neurons, E times."""
        everything = ExpertSpec(torch.arange(ffn.intermediate_size))
        return LayerBlueprint(ffn.layer, routed=(everything,) * shape.experts, top_k=shape.top_k, scale=scale)
