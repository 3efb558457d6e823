"""Leaves out the experts that are used least (SEER-MoE)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import RefusalError
from upcycle.methods.compressing.base import Compression, LayerSource, best
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe


class FrequencyParameters(PluginParameters):
    """Parameters of :class:`Frequency`."""

    count: Literal["soft", "hard"] = Field(
        "soft", description="soft: the router's scores, summed over all tokens; hard: how many tokens chose the expert"
    )
    over: Literal["layer", "model"] = Field(
        "layer",
        description="layer: every layer keeps the same number; model: all experts compete, which no stock architecture can hold yet",
    )


class Frequency(Compression):
    """Implements heavy-hitters counting (Muzio et al. 2024, arXiv 2404.05089, section 3.1), the same number in every layer.

    ``hard_e = #{t : e chosen by t}``, ``soft_e = sum_t score_e(x_t)``; the experts of the largest counts are kept. Expert Drop (He et
    al. 2024, arXiv 2406.02500, section 3.3) is the soft count, in another paper's words.

    Deviation: both papers also count over all layers together, which leaves layers of different sizes; no stock architecture holds
    those, and ``over=model`` is refused.
    """

    name = "frequency"
    title = "Heavy-hitters counting"
    paper = "https://arxiv.org/abs/2404.05089"
    Parameters = FrequencyParameters
    parameters: FrequencyParameters

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return how many experts every layer keeps."""
        keep = super().kept(model, recipe)
        if self.parameters.over == "model":
            raise RefusalError(
                f"experts that compete over all layers leave layers of different sizes, and config.json of a '{model.family.name}' "
                "model has one number of experts for all",
                hint="--param over=layer",
            )
        return keep

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        return best(source.seen.score if self.parameters.count == "soft" else source.seen.load, keep)
