"""Lets every token leave out those of its experts that weigh little beside its first."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import UsageError
from upcycle.methods.compressing.base import WRAPPED, Compression, CutSizes, wraps
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.skip import SkipRule
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe

_PARTS = 1000  # of an expert run, in which the mean number of runs is counted


class SkipParameters(PluginParameters):
    """Parameters of :class:`Skip`."""

    weights: Literal["rescaled", "kept"] = Field(
        "rescaled",
        description="of the experts that are left, where the model normalises weights: rescaled to the sum of all K (the paper); kept "
        "as they are",
    )


class Skip(Compression):
    """Implements dynamic skipping (Lu et al. 2024, arXiv 2402.14800, section 3.3; ODP of Huang et al. 2024, arXiv 2410.06270).

    All experts stay; of the K that a token chooses, those are left out whose weight is below beta times its largest, with a beta for
    each layer. The largest always runs. ``keep`` is the mean share of the K runs that are left on the calibration text: beta is the
    quantile of the sampled tokens' weights, over their largest, that leaves out the others.

    Deviations: the papers skip the second of two experts with the median of its weight over the first's as beta, which is
    ``keep=0.75`` here; here any K and share. ODP also keeps all experts of tokens that much attention is paid to; here no token is
    protected. Where the model normalises weights, those that are left are given the sum of all again (``weights=rescaled``), or
    not (``kept``), which suits experts that are pieces of one FFN.
    """

    name = "skip"
    title = "Dynamic skipping"
    paper = "https://arxiv.org/abs/2402.14800"
    Parameters = SkipParameters
    parameters: SkipParameters
    wrapped = True

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return the mean number of experts that run for a token, in thousandths.

        Raises:
            UsageError: the recipe does not say, a token would have no expert, or the target's routers leave none out.
        """
        if recipe.keep is None:
            raise UsageError("skip needs to know which share of the expert runs is kept", hint="--keep 0.75")
        runs = round(recipe.keep * model.top_k * _PARTS)
        if runs < _PARTS or (runs >= model.top_k * _PARTS and recipe.keep < 1):
            raise UsageError(
                f"keep {recipe.keep:g} of {model.top_k} expert runs per token leaves {recipe.keep * model.top_k:.4g}, and a token has "
                f"one at least and {model.top_k} at most",
                hint=f"--keep {math.ceil(100 / model.top_k) / 100:g} or more"
                if model.top_k > 1
                else "a token chooses one expert already",
            )
        if recipe.keep < 1 and not wraps(model, recipe):
            raise UsageError(
                f"the routers of a '{model.family.name}' model run as many experts for every token, and skip leaves some out",
                hint=f"--target {WRAPPED}, or --method lower_top_k",
            )
        return runs

    def sizes(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes of the result, with the mean number of experts per token rounded up."""
        return CutSizes(model.experts, -(-keep // _PARTS), model.expert_width)

    def changed(self, model: MoeModel, keep: int) -> bool:
        """Return whether a token may run fewer experts."""
        return keep < model.top_k * _PARTS

    def active(self, model: MoeModel, keep: int) -> float:
        """Return how many experts run for a token, in the mean."""
        return keep / _PARTS

    def before(self, model: MoeModel, keep: int) -> LayerCut:
        """Return the cut that keeps every expert."""
        return LayerCut.keeping(range(model.experts))

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """Return what is gone, and what the result is."""
        mean = f"{keep / _PARTS:g}"
        return (
            f"a token runs {mean} experts in the mean, not {model.top_k}",
            f"{model.experts} experts, {mean} of {model.top_k} run in the mean",
        )

    def rule(self, model: MoeModel, layer: int, cut: LayerCut, keep: int) -> RouterRule:
        """Return the stock rule with the layer's beta."""
        plain = vars(self.stock_rule(model, layer, model.top_k))
        return SkipRule(**{"biased": False, **plain}, beta=cut.skip, rescaled=self.parameters.weights == "rescaled")

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        every = LayerCut.keeping(range(source.seen.experts))
        return replace(every, skip=threshold(source.seen.sample_weights, source.top_k, keep / _PARTS / source.top_k))


def threshold(weights: torch.Tensor, top_k: int, share: float) -> float:
    """Return the beta that keeps a share of the expert runs.

    Args:
        weights: of the experts of some tokens, ``[S, E]``, 0 where one was not chosen.
        top_k: K.
        share: of the S K runs that are left; where several weigh the same beside their first, more may be.
    """
    largest = weights.double().topk(top_k, dim=1).values
    ratios = (largest[:, 1:] / largest[:, :1].clamp(min=1e-300)).flatten().sort().values
    gone = min(round((1 - share) * len(largest) * top_k), len(ratios))
    if gone == 0:
        return 0.0
    if gone == len(ratios):
        return 1.0
    return float(ratios[gone - 1] + ratios[gone]) / 2  # between the last that goes and the first that stays
