"""Leaves out the experts whose absence changes the layer's output least, found by search (NAEE)."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut
from upcycle.methods.compressing.base import Compression
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.plugins import PluginParameters

if TYPE_CHECKING:
    import torch


class NaeeParameters(PluginParameters):
    """Parameters of :class:`Naee`."""

    most_sets: int = Field(2000, ge=1, description="all sets of experts are tried where there are no more of them")
    swaps: int = Field(
        200,
        ge=0,
        description="beyond that, exchanges of a kept expert for one left out that are tried after a greedy search",
    )


class Naee(Compression):
    """Implements expert pruning by reconstruction (Lu et al. 2024, arXiv 2402.14800, section 3.2, layer by layer).

    The set D of experts that are left out is the one with the least ``sum_t ||Z(x_t) - Z_D(x_t)||^2``, where Z is the output of the
    routed experts, and Z_D that with the router choosing among the others (its weights normalised again where the model does so).

    All sets are tried where there are few, as in the paper; else experts leave one by one, always the one whose absence costs
    least, and then pairs are exchanged as long as that helps (the paper has no search for many experts).

    Deviations: the squared error over a sample of the calibration's tokens, which is exact for them: with the products of all
    experts' outputs on a token, the error of any set needs no expert to run again. The paper sums norms over batches. Inputs of
    every layer are the uncut model's (the paper's layer-wise driver).
    """

    name = "naee"
    title = "Reconstruction search (NAEE)"
    paper = "https://arxiv.org/abs/2402.14800"
    Parameters = NaeeParameters
    parameters: NaeeParameters

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        experts = source.seen.experts
        if math.comb(experts, keep) <= self.parameters.most_sets:
            sets = [list(kept) for kept in itertools.combinations(range(experts), keep)]
            return LayerCut.keeping(sets[_least(source, sets)])
        kept = [*range(experts)]
        while len(kept) > keep:
            sets = [[*kept[:i], *kept[i + 1 :]] for i in range(len(kept))]
            kept = sets[_least(source, sets)]
        return LayerCut.keeping(self._exchanged(source, kept))

    def _exchanged(self, source: LayerSource, kept: list[int]) -> list[int]:
        """Return the set after exchanging pairs as long as that lessens the error."""
        error, tried = error_of(source, kept), 0
        better = True
        while better and tried < self.parameters.swaps:
            better = False
            outside = [expert for expert in range(source.seen.experts) if expert not in kept]
            for place, expert in itertools.product(range(len(kept)), outside):
                if tried >= self.parameters.swaps:
                    break
                tried += 1
                other = [*kept[:place], expert, *kept[place + 1 :]]
                if (found := error_of(source, other)) < error:
                    kept, error, better = other, found, True
                    break
        return kept


def _least(source: LayerSource, sets: list[list[int]]) -> int:
    errors = [error_of(source, kept) for kept in sets]
    return errors.index(min(errors))


def error_of(source: LayerSource, kept: list[int]) -> float:
    """Return the squared error of a layer that keeps some experts, over that of one without any, on the sampled tokens."""
    weights = source.seen.sample_weights.double()
    change = weights - kept_weights(source, kept)
    gram = source.seen.sample_gram.double()
    whole = _square(weights, gram)
    return _square(change, gram) / whole if whole else 0.0


def kept_weights(source: LayerSource, kept: list[int]) -> torch.Tensor:
    """Return what every expert weighs on every sampled token where the router chooses among ``kept`` alone, fp64 ``[S, E]``."""
    import torch

    seen = source.seen
    inside = seen.sample_logits.double()[:, kept]
    scores = inside.sigmoid() if source.sigmoid else inside.softmax(-1)  # the rows that are gone leave the softmax
    chosen = (scores + seen.bias[kept]).topk(min(source.top_k, len(kept)), dim=-1).indices
    weights = scores.gather(1, chosen)
    if source.normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    spread = torch.zeros(len(scores), len(kept), dtype=torch.float64).scatter_(1, chosen, weights * seen.factor)
    whole = torch.zeros(len(scores), seen.experts, dtype=torch.float64)
    whole[:, kept] = spread
    return whole


def _square(weights: torch.Tensor, gram: torch.Tensor) -> float:
    """Return ``sum_t ||sum_e w_te f_e(x_t)||^2`` from the products of the outputs."""
    import torch

    return float(torch.einsum("se,sef,sf->", weights, gram, weights))
