"""Cuts nothing: only the precision of what is stored changes."""

from __future__ import annotations

from upcycle.architectures.expert_terms import LayerCut
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import UsageError
from upcycle.methods.compressing.base import Compression
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.recipe.conversion_recipe import Recipe


class Quantize(Compression):
    """Implements rounding alone: all experts stay, in the bits that the recipe's ``precision`` says.

    The rounding itself (GPTQ, Frantar et al. 2022, arXiv 2210.17323; the allocation of MC-MoE, arXiv 2410.06270) is in
    :mod:`upcycle.precision`, and is what every method that cuts can have done to its result, too.

    Deviations of the rounding from GPTQ: every expert has the Hessian of the tokens that chose it, each token counted by its
    squared weight; columns of large inputs are rounded first; scales are searched for with these inputs in mind, and may be
    negative; damping grows where an expert saw few tokens; where nearest rounding changes held-out outputs less, it is used.
    """

    name = "quantize"
    title = "Rounding to few bits"
    paper = "https://arxiv.org/abs/2210.17323"
    observes = False
    looks = False
    removes = False

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return the number of experts.

        Raises:
            UsageError: the recipe names no precision, or wants experts gone.
        """
        if recipe.precision.bits is None:
            raise UsageError("quantize needs to know in how many bits experts are stored", hint="--bits 4")
        if recipe.keep not in (None, 1):
            raise UsageError(
                f"quantize leaves out no experts, and keep is {recipe.keep:g}",
                hint=f"--method naee --keep {recipe.keep:g} --bits {recipe.precision.bits} does both",
            )
        return model.experts

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """Return the cut that keeps every expert."""
        return LayerCut.keeping(range(source.seen.experts))
