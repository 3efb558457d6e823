"""Keeps the experts that add most to the output, and merges the others into those most like them (REAM)."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import UsageError
from upcycle.methods.compressing.base import Compression
from upcycle.methods.compressing.dropping.reap import reap_scores
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.methods.compressing.merging.merge_groups import merged
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe

_MOST_SALIENCY = 0.5  # of an expert that no token chose, as in the published code


class ReamParameters(PluginParameters):
    """Parameters of :class:`Ream`."""

    group_size: int = Field(16, ge=2, description="the most experts that become one (the paper's C)")


class Ream(Compression):
    """Implements router-weighted expert activation merging (Jha et al. 2026, arXiv 2604.04356, and its published code).

    The experts of the largest saliencies (REAP's) stay. From the most salient one on, each takes those experts that are most like it
    and still free, up to ``group_size`` with itself, until none is free: most stay alone ("pseudo-pruning"). Two experts' likeness is
    the mean of ``(1 + cos) / 2`` of their mean outputs, each output times the router's score of its expert, and of
    ``1 - d / max d``, with the distance d of their router logits over all tokens, each of length 1. Before a group is added up,
    neurons are matched with those of the expert that stays: the sum of two distances is the least that there is (an assignment), that
    of activations over tokens and that of a neuron's weights ``[gate, up, down^T]``, each of length 1. Members weigh as much as their
    saliencies; one that no token chose has the least saliency of the others, 0.5 at most. Router rows are those of the experts that
    stay.

    Deviations: mean outputs and activations are over the sampled tokens. The published code projects weights to 64 dimensions before
    it matches neurons; here all are compared. It observes every layer behind layers that are merged already; here all layers are
    observed on the uncut model, once for every method, and the refit then goes through merged layers. Its saliency multiplies by
    the router's score twice where outputs are gated; here it is REAP's, as the paper says.
    """

    name = "ream"
    title = "Router-weighted merging (REAM)"
    paper = "https://arxiv.org/abs/2604.04356"
    grouped = True
    Parameters = ReamParameters
    parameters: ReamParameters

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return how many experts every layer keeps."""
        keep = super().kept(model, recipe)
        most = self.parameters.group_size
        if keep * most < model.experts:
            raise UsageError(
                f"{keep} groups of at most {most} experts do not hold {model.experts}",
                hint=f"--param group_size={-(-model.experts // keep)} or more",
            )
        return keep

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        saliency = reap_scores(source.seen)
        chosen = saliency[saliency > 0]
        unused = min(_MOST_SALIENCY, float(chosen.min())) if len(chosen) else 1.0
        saliency = saliency.where(saliency > 0, unused)
        groups = _groups(saliency, likeness(source), keep, self.parameters.group_size)
        orders: dict[int, tuple[int, ...]] = {}
        for first, *others in groups:
            orders.update(_matched(source, first, others))
        return merged(groups, saliency, orders)


def likeness(source: LayerSource) -> torch.Tensor:
    """Return how alike every two experts are, fp64 ``[E, E]``, between 0 and 1."""
    outputs = torch.nn.functional.normalize(source.seen.gated_output.double(), dim=1, eps=1e-30)
    alike = (1 + outputs @ outputs.T) / 2
    length = source.seen.logits_gram.double().diagonal().clamp(min=1e-30).sqrt()
    cosine = source.seen.logits_gram.double() / length / length[:, None]
    apart = (2 - 2 * cosine).clamp(min=0).sqrt()
    routed = 1 - apart / apart.max().clamp(min=1e-30)
    return (alike + routed) / 2


def _groups(saliency: torch.Tensor, alike: torch.Tensor, keep: int, most: int) -> list[list[int]]:
    """Return groups of experts, each with the one that stays first."""
    order = torch.sort(saliency, descending=True, stable=True).indices.tolist()
    groups, free = [[expert] for expert in order[:keep]], set(order[keep:])
    for group in groups:
        close = alike[group[0]].tolist()
        near = sorted((-close[expert], expert) for expert in free)[: most - 1]
        group += [expert for _, expert in near]
        free -= set(group)
    return groups


def _matched(source: LayerSource, first: int, others: list[int]) -> dict[int, tuple[int, ...]]:
    """Return the orders in which the neurons of ``others`` match those of the expert ``first``."""
    from scipy.optimize import linear_sum_assignment

    if not others:
        return {}
    x = source.seen.sample_inputs

    def described(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = source.matrices(expert)
        active = source.hidden(own, x)
        weights = torch.cat([own["gate"], own["up"], own["down"].T], 1)
        return _rows_of_length_one(active.T), _rows_of_length_one(weights)

    mine, found = described(first), {}
    for expert in others:
        apart = sum(torch.cdist(one, other) for one, other in zip(mine, described(expert), strict=True))
        assert isinstance(apart, torch.Tensor)
        _, order = linear_sum_assignment(apart.numpy())
        found[expert] = tuple(int(i) for i in order)
    return found


def _rows_of_length_one(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-30)
