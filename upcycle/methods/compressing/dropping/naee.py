"""Leaves out the experts whose absence changes the layer's output least, found by search (NAEE)."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut
from upcycle.methods.compressing.base import Compression
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.methods.compressing.sparse_mixer import sparse_mixer
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
            errors = removal_errors(source, kept).tolist()
            del kept[errors.index(min(errors))]
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
    gram = source.seen.sample_gram
    whole = _square(weights, gram)
    return _square(change, gram) / whole if whole else 0.0


def kept_weights(source: LayerSource, kept: list[int]) -> torch.Tensor:
    """Return what every expert weighs on every sampled token where the router chooses among ``kept`` alone, fp64 ``[S, E]``."""
    import torch

    seen = source.seen
    inside = seen.sample_logits.double()[:, kept]
    if source.jitter is not None:
        chosen, weights = sparse_mixer(inside, source.jitter)
        found = torch.zeros(len(inside), seen.experts, dtype=torch.float64)
        found[:, kept] = torch.zeros_like(inside).scatter_(1, chosen, weights)
        return found
    scores = inside.sigmoid() if source.sigmoid else inside.softmax(-1)  # the rows that are gone leave the softmax
    chosen = (scores + seen.bias[kept]).topk(min(source.top_k, len(kept)), dim=-1).indices
    weights = scores.gather(1, chosen)
    if source.normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    spread = torch.zeros(len(scores), len(kept), dtype=torch.float64).scatter_(1, chosen, weights * seen.factor)
    whole = torch.zeros(len(scores), seen.experts, dtype=torch.float64)
    whole[:, kept] = spread
    return whole


def removal_errors(source: LayerSource, kept: list[int]) -> torch.Tensor:
    """Return the squared error of a layer that keeps all but one of some experts, for each one, fp64 ``[len(kept)]``.

    It is :func:`error_of` of each such set, at once. A token that does not choose the expert that is gone goes on
    choosing the same ones; where their scores are not normalised again, all of them grow by the same factor. Only a token that chose
    it gets another one, the first behind those chosen.
    """
    import torch

    seen, top_k, count = source.seen, min(source.top_k, len(kept) - 1), len(kept)
    # Scores that all grow may be chosen in another order beside a bias, and SparseMixer weighs by those that are near.
    if source.jitter is not None or (not source.sigmoid and bool(seen.bias.any())):
        sets = [[*kept[:i], *kept[i + 1 :]] for i in range(count)]
        return torch.tensor([error_of(source, one) for one in sets], dtype=torch.float64)
    inside = seen.sample_logits.double()[:, kept]
    scores = inside.sigmoid() if source.sigmoid else inside.softmax(-1)
    factors = torch.ones_like(scores) if source.sigmoid or source.normalized else 1 / _of_the_others(scores)
    first = (scores + seen.bias[kept]).topk(top_k + 1, dim=-1).indices  # [S, K + 1]
    raw = seen.factor * scores.gather(1, first)
    places = torch.tensor(kept)[first]
    gram = _products(seen.sample_gram, places)  # [S, K + 1, K + 1]
    whole = seen.sample_weights.double()
    towards = torch.einsum("ske,se->sk", _rows(seen.sample_gram, places), whole)  # with the output of the uncut layer
    # Of those that choose it: every other one of the first K + 1 weighs what it scores.
    left = raw[:, None, :] * (1 - torch.eye(top_k + 1, dtype=torch.float64))[:top_k]  # [S, K, K + 1]
    left = seen.factor * left / left.sum(-1, keepdim=True) if source.normalized else left
    grown = factors.gather(1, first[:, :top_k])
    cross = grown * torch.einsum("sjk,sk->sj", left, towards)
    square = grown.square() * torch.einsum("sjk,skl,sjl->sj", left, gram, left)
    chosen = torch.zeros_like(scores).scatter_(1, first[:, :top_k], square - 2 * cross)
    # Of those that do not: the same ones as before.
    same = raw[:, :top_k]
    same = seen.factor * same / same.sum(-1, keepdim=True) if source.normalized else same
    cross = (same * towards[:, :top_k]).sum(-1, keepdim=True)
    square = torch.einsum("sk,skl,sl->s", same, gram[:, :top_k, :top_k], same)[:, None]
    chooses = torch.zeros_like(scores).scatter_(1, first[:, :top_k], 1.0)
    others = (1 - chooses) * (factors.square() * square - 2 * factors * cross)
    square_of_all = _square(whole, seen.sample_gram)
    errors = (chosen + others).sum(0) + square_of_all
    return errors / square_of_all if square_of_all else torch.zeros_like(errors)


def _of_the_others(scores: torch.Tensor) -> torch.Tensor:
    """Return for every score ``[S, E]`` the sum of the others in its row, without cancellation."""
    import torch

    none = torch.zeros_like(scores[:, :1])
    before = torch.cat([none, scores[:, :-1].cumsum(1)], 1)
    behind = torch.cat([scores[:, 1:].flip(1).cumsum(1).flip(1), none], 1)
    return (before + behind).clamp(min=1e-300)


def _rows(gram: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the rows ``[S, k, E]`` of experts ``[S, k]`` of every token's products ``[S, E, E]``, fp64."""
    return gram.gather(1, places[:, :, None].expand(-1, -1, gram.shape[-1])).double()


def _products(gram: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the products ``[S, k, k]`` among experts ``[S, k]`` out of ``[S, E, E]``, fp64."""
    pairs = places[:, :, None] * gram.shape[-1] + places[:, None, :]
    return gram.flatten(1).gather(1, pairs.flatten(1)).view(pairs.shape).double()


def _square(weights: torch.Tensor, gram: torch.Tensor) -> float:
    """Return ``sum_t ||sum_e w_te f_e(x_t)||^2`` from the products of the outputs; those of few are read where few weigh anything."""
    import torch

    few = int((weights != 0).sum(1).max())
    if 2 * few > weights.shape[1]:
        return float(torch.einsum("se,sef,sf->", weights, gram.double(), weights))
    places = weights.abs().topk(few, dim=1).indices
    own = weights.gather(1, places)
    return float(torch.einsum("sk,skl,sl->", own, _products(gram, places), own))
