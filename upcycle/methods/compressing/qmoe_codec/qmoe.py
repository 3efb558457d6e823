"""Rounds experts to three numbers per row."""

from __future__ import annotations

from upcycle.architectures.expert_terms import LayerCut, Term
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import UsageError
from upcycle.methods.compressing.base import Compression, CutSizes, best
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.recipe.conversion_recipe import Recipe


class Qmoe(Compression):
    """Implements QMoE's ternary experts (Frantar & Alistarh 2023, arXiv 2310.16795).

    Every row of an expert's matrices is rounded to its smallest number, 0 and its largest. With the refit, the errors are made up for
    column by column, by the second moments of the inputs that the router sends to the expert (GPTQ, damped by 0.1 times the mean of
    their diagonal, as the paper does; an expert without tokens is rounded to the nearest); ``refit: none`` rounds all to the nearest.
    The result is a stock model as large as before: ``upcycle pack`` stores its experts in the paper's codes, below a bit per weight
    where most are zeros.

    Deviations: ``keep`` is the part of the experts of every layer that are left as they are, those that most tokens chose (default:
    none). The model that calibrates a layer has the rounded experts below it, and shared experts are never rounded. The paper's
    models are of the Switch type (ReLU, no gate); others lose much more.
    """

    name = "qmoe"
    title = "Ternary experts"
    paper = "https://arxiv.org/abs/2310.16795"
    next_step = "upcycle pack {out} PACKED"
    looks = False
    ternary = True

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return the number of experts of every layer that are left as they are."""
        if recipe.keep is None:
            return 0
        keep = round(recipe.keep * model.experts)
        if keep == model.experts and recipe.keep < 1:
            raise UsageError(
                f"keep {recipe.keep:g} of {model.experts} experts rounds to all of them, and none would be ternary",
                hint=f"--keep {(model.experts - 1) / model.experts:.4g}, or leave it out: all become ternary",
            )
        return keep

    def sizes(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes of the result, those of the source."""
        return CutSizes.of(model)

    def changed(self, model: MoeModel, keep: int) -> bool:
        """Return whether any expert is rounded."""
        return keep < model.experts

    def before(self, model: MoeModel, keep: int) -> LayerCut:
        """Return the cut that keeps every expert."""
        return LayerCut.keeping(range(model.experts))

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """Return what is rounded, and what the result is."""
        rounded = model.experts - keep
        return (
            f"{rounded} of {model.experts} experts of every layer have three numbers per row",
            f"{rounded} ternary experts of {model.experts}, top-{model.top_k}",
        )

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        whole = set(best(source.seen.load, keep).rows)
        experts = range(source.seen.experts)
        return LayerCut(tuple((Term(expert, ternary=expert not in whole),) for expert in experts), tuple(experts))
