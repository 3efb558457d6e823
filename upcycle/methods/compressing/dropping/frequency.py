"""Leaves out the experts that are used least (SEER-MoE)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut
from upcycle.methods.compressing.base import Compression, LayerSource, best
from upcycle.plugins import PluginParameters


class FrequencyParameters(PluginParameters):
    """Parameters of :class:`Frequency`."""

    count: Literal["soft", "hard"] = Field(
        "soft", description="soft: the router's scores, summed over all tokens; hard: how many tokens chose the expert"
    )


class Frequency(Compression):
    """Implements heavy-hitters counting (Muzio et al. 2024, arXiv 2404.05089, section 3.1), the same number in every layer.

    ``hard_e = #{t : e chosen by t}``, ``soft_e = sum_t score_e(x_t)``; the experts of the largest counts are kept.

    Deviation: the paper also counts over all layers together, which leaves layers of different sizes; no stock architecture holds
    those.
    """

    name = "frequency"
    title = "Heavy-hitters counting"
    paper = "https://arxiv.org/abs/2404.05089"
    Parameters = FrequencyParameters
    parameters: FrequencyParameters

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        return best(source.seen.score if self.parameters.count == "soft" else source.seen.load, keep)
