"""Layers of a MoE made of random numbers, for methods that compress one: no model, and no text."""

from __future__ import annotations

from typing import Any

import torch

from upcycle.methods.compressing.layer_source import LayerSource, Matrices
from upcycle.methods.compressing.observed_layer import LayerObservations


def random_observations(experts: int, seed: int = 0, tokens: int = 50, top_k: int = 2) -> LayerObservations:
    """Numbers that fit together: outputs, logits, and what a normalised softmax router makes of them."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=draw).double()
    outputs = torch.randn(tokens, experts, 6, generator=draw).double() * torch.rand(experts, 1, generator=draw).double()
    outputs += torch.randn(experts, 6, generator=draw).double()
    scores = logits.softmax(-1)
    ids = scores.topk(top_k).indices
    weights = torch.zeros_like(scores).scatter(1, ids, scores.gather(1, ids))
    weights /= weights.sum(1, keepdim=True)
    chosen, norms = (weights > 0).double(), outputs.norm(dim=-1)
    return LayerObservations(
        tokens=torch.tensor([tokens]).double(),
        load=chosen.sum(0),
        weight=weights.sum(0),
        score=scores.sum(0),
        norm=(norms * chosen).sum(0),
        saliency=(norms * weights).sum(0),
        logits_gram=logits.T @ logits,
        ratios=torch.zeros(101).double(),
        similarity=torch.tensor([0.5]).double(),
        bias=torch.zeros(experts).double(),
        factor=torch.ones(1).double(),
        neurons=torch.rand(experts, 5, generator=draw),
        neuron_gram=torch.eye(5).expand(experts, 5, 5).clone(),
        input_gram=torch.eye(7).expand(experts, 7, 7).clone(),
        shared=torch.zeros(0),
        shared_weight=torch.zeros(1).double(),
        sample_logits=logits,
        sample_weights=weights,
        sample_gram=outputs @ outputs.mT,
        sample_inputs=torch.randn(tokens, 7, generator=draw),  # as wide as random_matrices
        mean_output=outputs.mean(0),
        gated_output=(scores[:, :, None] * outputs).mean(0),
    )


def random_matrices(width: int = 5, hidden: int = 7, seed: int = 0) -> Matrices:
    """Another expert for every index, gate, up and down."""

    def get(expert: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(1000 * seed + expert)
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}

    return get


def layer_source(seen: LayerObservations, matrices: Matrices | None = None, **changes: Any) -> LayerSource:
    given: dict[str, Any] = {"top_k": 2, "normalized": True, "sigmoid": False, "seed": 0, **changes}
    return LayerSource(layer=0, seen=seen, matrices=matrices or random_matrices(), **given)
