"""Makes every expert narrower: neurons are left out, and what is left is refitted."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import UsageError
from upcycle.methods.compressing.base import WRAPPED, Compression, CutSizes, stepped, wraps
from upcycle.methods.compressing.inside.widths import check_width_alone, of_neurons
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.methods.compressing.leverage import ridge_leverage
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe


class SlimParameters(PluginParameters):
    """Parameters of :class:`Slim`."""

    score: Literal["output", "leverage"] = Field(
        "output",
        description="output: how much the neuron adds to the layer's output; leverage: how little the other neurons can replace it",
    )
    ridge: float = Field(
        1e-4, gt=0, description="of leverage: the regularisation, relative to the mean square of an activation"
    )


class Slim(Compression):
    """Implements structured pruning inside experts ("expert slimming", He et al. 2024, arXiv 2406.02500, section 3.2).

    Every expert keeps the part ``keep`` of its neurons. With the activations ``h_j`` times the router's weight, a neuron's score is
    ``sum h_j^2 * ||down_j||^2`` over the tokens that chose the expert (output), or the ridge leverage
    ``[C (C + ridge I)^-1]_jj`` of ``C = sum h h^T`` (leverage: MoDeGPT, Lin et al. 2024, arXiv 2408.09632, algorithm 1). An expert
    that no token chose keeps its first neurons.

    Deviation: both papers fit the down projection of one MLP at a time; here the refit (``--refit down``) fits those of all experts
    of a layer, which contains that.
    """

    name = "slim"
    title = "Narrower experts"
    paper = "https://arxiv.org/abs/2406.02500"
    Parameters = SlimParameters
    parameters: SlimParameters

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return the number of neurons that every expert keeps."""
        width, step = model.expert_width, stepped(model.expert_width)
        if recipe.keep is None:
            raise UsageError("slim needs to know how many neurons every expert keeps", hint="--keep 0.75")
        if recipe.keep == 1:
            return width
        if not wraps(model, recipe):
            hint = f"--target {WRAPPED}, or a method that leaves out whole experts, such as --method naee"
            check_width_alone(model, self.name, hint)
        keep = max(1, round(recipe.keep * width / step)) * step
        if keep >= width:
            raise UsageError(
                f"keep {recipe.keep:g} of {width} neurons is {keep}, rounded to a multiple of {step}: nothing would be smaller",
                hint=f"--keep {(width - step) / width:.4g} or less"
                if width > step
                else "experts of so few neurons stay as they are",
            )
        return keep

    def sizes(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes of the result: only the width changes."""
        return CutSizes(model.experts, model.top_k, keep)

    def before(self, model: MoeModel, keep: int) -> LayerCut:
        """Return the cut that keeps the first neurons of every expert."""
        if keep == model.expert_width:
            return LayerCut.keeping(range(model.experts))
        return of_neurons([[*range(keep)]] * model.experts)

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """Return what is gone, and what the result is."""
        gone = f"{model.expert_width - keep} of {model.expert_width} neurons are gone from every expert"
        return gone, f"{model.experts} experts of {keep} neurons from {model.expert_width}"

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        found = []
        for expert in range(source.seen.experts):
            best = torch.sort(self._scores(source, expert), descending=True, stable=True).indices[:keep]
            found.append(sorted(best.tolist()))
        return of_neurons(found)

    def _scores(self, source: LayerSource, expert: int) -> torch.Tensor:
        """Return the score of every neuron of an expert, fp64 ``[F]``."""
        seen = source.seen
        if self.parameters.score == "output":
            return seen.neurons[expert].double() * source.matrices(expert)["down"].double().square().sum(0)
        if not seen.neuron_gram.numel():
            raise UsageError(
                f"leverage needs the products of the neurons of {seen.experts} experts, which would take too much memory",
                hint="--param score=output",
            )
        return ridge_leverage(seen.neuron_gram[expert], self.parameters.ridge)
