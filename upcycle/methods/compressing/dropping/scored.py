"""What methods share that leave out the experts of the smallest scores: equally many in every layer, or where they score least."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import UsageError
from upcycle.methods.compressing.base import WRAPPED, Compression, best, wraps
from upcycle.methods.compressing.described_cuts import Cut
from upcycle.methods.compressing.layer_source import LayerSource, ModelSource
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    import torch


class ScoredParameters(PluginParameters):
    """Parameters of :class:`Scored`."""

    layers: Literal["even", "uneven"] = Field(
        "even",
        description="even: every layer keeps equally many experts; uneven: all layers together keep as many, those of the largest "
        "shares of their layer's scores, and every layer at least as many as a token chooses (target upcycle_moe)",
    )


class Scored(Compression):
    """Keeps the experts of the largest scores.

    With ``layers=uneven`` the budget is that of the whole model, as in the global forms of heavy-hitters counting (Muzio et al. 2024,
    arXiv 2404.05089) and of expert drop (He et al. 2024, arXiv 2406.02500): scores are divided by their layer's sum, and the largest
    of all layers are kept. Counts and scores of routers, of which these papers speak, have the same sum in every layer anyway.
    """

    Parameters = ScoredParameters
    grouped = True
    parameters: ScoredParameters

    @abstractmethod
    def scores(self, source: LayerSource) -> torch.Tensor:
        """Return the score of every expert of a layer, ``[E]``, none negative."""

    @property
    def uneven(self) -> bool:
        """Whether layers may keep different numbers of experts."""
        return self.parameters.layers == "uneven"

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """See :class:`~upcycle.methods.compressing.base.Compression`: a mean, where layers are uneven.

        Raises:
            UsageError: layers are uneven, and the target holds no such ones.
        """
        keep = super().kept(model, recipe)
        if self.uneven and keep < model.experts and not wraps(model, recipe):
            raise UsageError(
                f"layers=uneven leaves layers of different sizes, and a '{model.family.name}' model has equally many experts in all",
                hint=f"--target {WRAPPED}, or --param layers=even",
            )
        return keep

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """See :class:`~upcycle.methods.compressing.base.Compression`."""
        gone, summary = super().said(model, keep)
        if not self.uneven or keep == model.experts:
            return gone, summary
        return (
            f"{gone}, in the mean",
            f"{keep} experts in the mean of all layers from {model.experts}, top-{model.top_k}",
        )

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        return best(self.scores(source), keep)

    def cuts(self, source: ModelSource, keep: int) -> dict[int, Cut]:
        """See :class:`~upcycle.methods.compressing.base.Compression`."""
        if not self.uneven:
            return super().cuts(source, keep)
        scores = {layer: self.scores(own) for layer, own in source.layers.items()}
        counts = shared_out(scores, keep * len(scores), source.model.top_k)
        return {layer: best(own, counts[layer]) for layer, own in scores.items()}


def shared_out(scores: Mapping[int, torch.Tensor], total: int, least: int) -> dict[int, int]:
    """Return how many experts every layer keeps of ``total`` in all.

    Args:
        scores: of every layer's experts, ``[E]``, none negative.
        total: of all layers together, at least ``least`` for each.
        least: what every layer keeps.
    """
    shares: list[tuple[float, int]] = []
    for layer, own in scores.items():
        whole = own.double().sum().clamp(min=1e-300)
        ordered = (own.double() / whole).sort(descending=True).values
        shares += [(-share, layer) for share in ordered[least:].tolist()]  # the best stay anyway
    counts = dict.fromkeys(scores, least)
    for _, layer in sorted(shares)[: total - least * len(scores)]:
        counts[layer] += 1
    return counts
