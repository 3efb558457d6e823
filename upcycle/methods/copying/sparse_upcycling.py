"""Sparse upcycling: every expert is a copy of the dense FFN."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.copying.base import CopiesParameters, WholeCopies, seeded


class SparseUpcyclingParameters(CopiesParameters):
    """Parameters of :class:`SparseUpcycling`."""

    noise: float = Field(
        0.0,
        ge=0,
        description="normal noise on every expert's gate, up and down, as a fraction of each matrix's standard deviation",
    )


class SparseUpcycling(WholeCopies):
    """Implements sparse upcycling (Komatsuzaki et al., ICLR 2023, arXiv 2212.05055).

    Here the top-k weights are renormalised to sum to 1, which preserves the dense function at any k and helps vision
    models; the paper's language models leave them as the softmax gives them (``gate=softmax``) and start from about k/E of
    the FFN's output. The paper upcycles half of the layers (``--layers every-other`` or ``last-half``).

    Its vision models and encoders route by expert choice: ``routing: expert_choice``, as the recipe sparse_upcycling_vision has it.

    Deviations: no expert dropout. ``noise`` is not in the paper's main
    recipe: experts drift apart faster, and the dense function is kept only approximately. It is added to matrices, not to
    biases.
    """

    name = "sparse_upcycling"
    title = "Sparse upcycling"
    paper = "https://arxiv.org/abs/2212.05055"
    Parameters = SparseUpcyclingParameters
    parameters: SparseUpcyclingParameters

    def random_change(self) -> str | None:
        """Return the noise on every expert, for messages; ``None`` without noise."""
        noise = self.parameters.noise
        return f"every expert has noise of {noise:g} of its weights' standard deviation" if noise else None

    def blueprint(
        self,
        ffn: FeedForward,
        shape: MoeShape,
        scale: float,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> LayerBlueprint:
        """Take all neurons E times."""
        everything = ExpertSpec(torch.arange(ffn.intermediate_size))
        draws = seeded(rng, noise=self.parameters.noise) if self.draws else None
        return LayerBlueprint(ffn.layer, (everything,) * shape.experts, shape.top_k, scale, draws=draws)
