"""Drop-Upcycling: copies of the dense FFN, each with some of its neurons re-initialised."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.copying.base import CopiesParameters, WholeCopies, chosen_mask, part_of, seeded


class DropUpcyclingParameters(CopiesParameters):
    """Parameters of :class:`DropUpcycling`."""

    ratio: float = Field(
        0.5, ge=0, le=1, description="share of every expert's neurons that are re-initialised; 0: plain copies"
    )
    shared_indices: bool = Field(
        True, description="re-initialise the same neurons in gate, up and down (false: other ones in each matrix)"
    )


class DropUpcycling(WholeCopies):
    """Implements Drop-Upcycling (Nakamura et al., ICLR 2025, arXiv 2502.19261).

    Every expert is a copy in which ``floor(r * F)`` random neurons take new weights: in each of gate, up and down, normal
    numbers with the mean and the standard deviation of all the weights they replace there. Biases of gate and up are
    re-initialised with their neurons, by the same rule; the down bias belongs to no neuron and stays.

    Deviations: the paper's text has one index set for the three matrices of an expert (``shared_indices``, the default);
    its code, as we have it at second hand, draws one for each, which touches more neurons. That code also permutes an
    expert's neurons first, which changes nothing that an expert computes and is left out.
    """

    name = "drop_upcycling"
    title = "Drop-Upcycling"
    paper = "https://arxiv.org/abs/2502.19261"
    Parameters = DropUpcyclingParameters
    parameters: DropUpcyclingParameters

    whole = "every expert is the whole FFN, partly re-initialised"

    def random_change(self) -> str | None:
        """Return the share of neurons that are re-initialised, if any are."""
        ratio = self.parameters.ratio
        return f"{ratio:.0%} of every expert's neurons are re-initialised" if ratio else None

    def blueprint(
        self,
        ffn: FeedForward,
        shape: MoeShape,
        scale: float,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> LayerBlueprint:
        """Take all neurons E times; which of them are re-initialised differs from expert to expert."""
        everything, count = torch.arange(ffn.intermediate_size), part_of(self.parameters.ratio, ffn.intermediate_size)
        if not count:
            return LayerBlueprint(ffn.layer, (ExpertSpec(everything),) * shape.experts, shape.top_k, scale)
        sets = 1 if self.parameters.shared_indices else 3

        def fresh() -> torch.Tensor:
            return (
                torch.stack([chosen_mask(len(everything), count, rng) for _ in range(sets)]).expand(3, -1).contiguous()
            )

        routed = tuple(ExpertSpec(everything, fresh()) for _ in range(shape.experts))
        return LayerBlueprint(ffn.layer, routed, shape.top_k, scale, draws=seeded(rng))
