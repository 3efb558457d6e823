"""Lets every token choose fewer experts."""

from __future__ import annotations

from upcycle.architectures.expert_terms import LayerCut
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import UsageError
from upcycle.methods.compressing.base import Compression, CutSizes
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.recipe.conversion_recipe import Recipe


class LowerTopK(Compression):
    """Implements fewer experts per token (Pan et al. 2024, arXiv 2404.05567, section 3.2; Muzio et al. 2024, arXiv 2404.05089).

    All experts stay; a token chooses the part ``keep`` of as many as before. Where the architecture normalises the weights, those
    of the chosen sum to 1 again; elsewhere their sum falls, and the refit makes up for that.

    Deviation: both papers train for it (a loss that spreads, or concentrates, the router's scores). Here down projections are
    refitted.
    """

    name = "lower_top_k"
    title = "Fewer experts per token"
    paper = "https://arxiv.org/abs/2404.05567"
    observes = False
    looks = False

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return the number of experts that a token will choose."""
        if recipe.keep is None:
            raise UsageError(
                "lower_top_k needs to know how many experts a token chooses", hint="--keep 0.5 halves their number"
            )
        keep = round(recipe.keep * model.top_k)
        if keep < 1 or (keep == model.top_k and recipe.keep < 1):
            raise UsageError(
                f"keep {recipe.keep:g} of {model.top_k} experts per token leaves {keep}",
                hint=f"--keep {max(1, model.top_k - 1) / model.top_k:.4g}"
                if model.top_k > 1
                else "a token chooses one expert already",
            )
        return keep

    def sizes(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes of the result: only top-k changes."""
        return CutSizes(model.experts, keep, model.expert_width)

    def before(self, model: MoeModel, keep: int) -> LayerCut:
        """Return the cut that keeps every expert."""
        return LayerCut.keeping(range(model.experts))

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """Return what is gone, and what the result is."""
        return (
            f"a token chooses {keep} experts, not {model.top_k}",
            f"{model.experts} experts, top-{keep} from {model.top_k}",
        )

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        return LayerCut.keeping(range(source.seen.experts))
