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
from upcycle.methods.compressing.described_cuts import Cut
from upcycle.methods.compressing.layer_source import LayerSource, ModelSource
from upcycle.methods.compressing.observed_layer import LayerObservations
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
    protect: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="the part of a text's tokens, those that later ones attend to most, that keep all their experts (ODP: 0.02)",
    )
    layers: int | None = Field(
        None,
        ge=1,
        description="how many layers leave experts out, those that lose least by it (ODP: 10); default: all",
    )


class Skip(Compression):
    """Implements dynamic skipping (Lu et al. 2024, arXiv 2402.14800, section 3.3; ODP of Huang et al. 2024, arXiv 2410.06270).

    All experts stay; of the K that a token chooses, those are left out whose weight is below beta times its largest, with a beta for
    each layer. The largest always runs. ``keep`` is the mean share of the K runs that are left on the calibration text: beta is the
    quantile of the sampled tokens' weights, over their largest, that leaves out the others.

    ODP adds two parameters. ``protect`` is the part of a text's tokens that keep all their experts: those of the largest importance,
    which is the attention that a token gets from later ones (the mean over these and over the heads) times the L1 norm of what its
    experts read. With ``layers``, only so many layers leave experts out, those whose experts' output changes least by it on the
    sampled tokens, relative to itself; each then leaves out more, so that ``keep`` holds for all layers together.

    Deviations: the papers skip the second of two experts with the median of its weight over the first's as beta, which is
    ``keep=0.75`` here; here any K and share. ODP has a table of betas from 0.40 to 0.62, and ranks its layers by a loss; here both
    come from the observations. It can also drop all experts of the least important tokens, of which its default is none; here
    none. Its authors' code sums attention over the keys, where every query's sums to 1; here it is summed over the queries. What one
    call reads is a text: tokens that a model writes with its cache have no later ones yet, and are not protected. Where the model
    normalises weights, those that are left are given the sum of all again (``weights=rescaled``), or not (``kept``), which suits
    experts that are pieces of one FFN.
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
        if recipe.keep < 1:
            self._check(model, runs)
        return runs

    def _check(self, model: MoeModel, runs: int) -> None:
        """Refuse shares that the protected tokens, or the few layers that leave experts out, cannot make up for.

        Raises:
            UsageError: see above; the message says what would be left elsewhere.
        """
        share = self._share(runs, model.top_k, len(model.moe_layers))
        if share * model.top_k < 1 - 1e-9:
            least = 1 - (1 - 1 / model.top_k) * (1 - self.parameters.protect) * self._part(len(model.moe_layers))
            raise UsageError(
                f"with protect={self.parameters.protect:g} and layers={self.parameters.layers or 'all'}, keep "
                f"{runs / _PARTS / model.top_k:g} would leave other tokens {share * model.top_k:.3g} of {model.top_k} experts; one "
                "always runs",
                hint=f"--keep {math.ceil(1000 * least) / 1000:g} or more",
            )

    def _part(self, layers: int) -> float:
        """Return the part of ``layers`` layers that leave experts out."""
        return min(self.parameters.layers or layers, layers) / layers

    def _share(self, keep: int, top_k: int, layers: int) -> float:
        """Return which share of the runs is left to tokens that are not protected, in layers that leave experts out."""
        gone = 1 - keep / _PARTS / top_k
        return 1 - gone / (1 - self.parameters.protect) / self._part(layers)

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
        protected = self.parameters.protect if cut.skip else 0.0
        rescaled = self.parameters.weights == "rescaled"
        return SkipRule(**{"biased": False, **plain}, beta=cut.skip, rescaled=rescaled, protected=protected)

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """Return the cut with the layer's beta, where all layers leave experts out."""
        return self._cut(source, self._share(keep, source.top_k, 1))

    def _cut(self, source: LayerSource, share: float) -> LayerCut:
        every = LayerCut.keeping(range(source.seen.experts))
        return replace(every, skip=threshold(source.seen.sample_weights, source.top_k, share))

    def cuts(self, source: ModelSource, keep: int) -> dict[int, Cut]:
        """See the class."""
        layers = source.layers
        found = {i: self._cut(own, self._share(keep, own.top_k, len(layers))) for i, own in layers.items()}
        rescaled = self.parameters.weights == "rescaled"
        losses = {i: skipping_loss(own.seen, found[i].skip, rescaled and own.normalized) for i, own in layers.items()}
        chosen = sorted(losses, key=lambda layer: losses[layer])[: self.parameters.layers]
        return {layer: cut if layer in chosen else replace(cut, skip=0.0) for layer, cut in found.items()}


def skipping_loss(seen: LayerObservations, beta: float, rescaled: bool) -> float:
    """Return what leaving experts out changes of the experts' output on the sampled tokens, over that output, both squared."""
    weights = seen.sample_weights.double()
    kept = weights * (weights >= beta * weights.amax(1, keepdim=True))
    if rescaled:
        kept = kept * (weights.sum(1, keepdim=True) / kept.sum(1, keepdim=True))
    gram = seen.sample_gram.double()
    change, whole = (torch.einsum("se,sef,sf->", each, gram, each).item() for each in (kept - weights, weights))
    return change / whole if whole else 0.0


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
