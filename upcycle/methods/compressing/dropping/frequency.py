"""Leaves out the experts that are used least (SEER-MoE)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from upcycle.methods.compressing.dropping.scored import Scored, ScoredParameters
from upcycle.methods.compressing.layer_source import LayerSource

if TYPE_CHECKING:
    import torch


class FrequencyParameters(ScoredParameters):
    """Parameters of :class:`Frequency`."""

    count: Literal["soft", "hard"] = Field(
        "soft", description="soft: the router's scores, summed over all tokens; hard: how many tokens chose the expert"
    )
    over: Literal["layer", "model"] = Field(
        "layer",
        description="layer: every layer keeps the same number; model: all experts compete, which no stock architecture can hold yet",
    )


class Frequency(Scored):
    """Implements heavy-hitters counting (Muzio et al. 2024, arXiv 2404.05089, section 3.1).

    The counts are those of one layer, or (``layers=uneven``) of all together.

    ``hard_e = #{t : e chosen by t}``, ``soft_e = sum_t score_e(x_t)``; the experts of the largest counts are kept. Expert Drop (He et
    al. 2024, arXiv 2406.02500, section 3.3) is the soft count, in another paper's words.

    Deviation: over all layers together, every layer keeps at least as many experts as a token chooses.
    """

    name = "frequency"
    title = "Heavy-hitters counting"
    paper = "https://arxiv.org/abs/2404.05089"
    Parameters = FrequencyParameters
    parameters: FrequencyParameters

    def scores(self, source: LayerSource) -> torch.Tensor:
        """See the class."""
        return source.seen.score if self.parameters.count == "soft" else source.seen.load
