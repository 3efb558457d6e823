"""CMoE's split: neurons that are among the strongest on the same tokens share an expert."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from pydantic import Field

from upcycle.ffn.activations import Activations, required
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.neurons import Neurons
from upcycle.plugins import PluginParameters
from upcycle.splitters.grouping.marker_assignment import marker_assignment
from upcycle.splitters.grouping.plain_sum import PlainSumPartition


class CMoEParameters(PluginParameters):
    """Parameters of :class:`CMoE`."""

    k_act: int = Field(10, ge=1, le=4096, description="how many of a token's strongest neurons are marked")
    iterations: int = Field(1, ge=1, le=100, description="how often neurons are assigned and centroids moved")


class CMoE(PlainSumPartition):
    """CMoE (arXiv 2502.04416): shared experts of the neurons marked most often, routed ones of neurons marked together.

    The activations are those of its released code, not the model's own: ``h = act(norm(x) norm(Wg)^T) * (norm(x)
    norm(Wu)^T)`` with tokens and weight rows scaled to length one, so that neither long tokens nor long rows decide. On
    every token the ``k_act`` largest ``|h|`` are marked. The shared neurons are those with the highest rate of marks; the
    others are clustered by their columns of marks (L1 distance, seeds = the highest rates, equal sizes) in
    :func:`~upcycle.splitters.grouping.marker_assignment.marker_assignment`, which says how it differs. Every chosen expert has
    weight one, so the ``paper`` scale is ``sum`` = K.

    Deviations: a token's marks are kept as neuron ids ``[T, k_act]`` and not as a ``[T, F]`` matrix of zeros and ones;
    all FFN activations are supported, where CMoE has SiLU, and FFNs without a gate; a bias is divided by the same lengths as
    its row and token are, so that its neuron fires where it did; equal rates go by the neuron's number; the router and its
    balancing bias are not made here, since no stock architecture computes ``|act(Wg x) * (Wu x)|``.
    """

    name = "cmoe"
    title = "CMoE split"
    paper = "https://arxiv.org/abs/2502.04416"
    calibrated = True
    Parameters = CMoEParameters
    parameters: CMoEParameters

    def __init__(self, parameters: CMoEParameters) -> None:
        super().__init__(parameters)
        # Shared and routed experts ask for the same marks, which are given up with the layer's activations.
        self._marks: WeakKeyDictionary[Activations, torch.Tensor] = WeakKeyDictionary()

    def shared_neurons(
        self, count: int, ffn: FeedForward, rng: torch.Generator, activations: Activations | None
    ) -> torch.Tensor:
        """Return the neurons that are marked most often."""
        rates = torch.bincount(self._marked(activations).flatten(), minlength=ffn.intermediate_size)
        return rates.argsort(descending=True, stable=True)[:count]

    def labels(
        self,
        neurons: torch.Tensor,
        experts: int,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Cluster the neurons by their marks; nothing is random."""
        found = marker_assignment(
            self._marked(activations),
            neurons,
            experts,
            intermediate_size=ffn.intermediate_size,
            iterations=self.parameters.iterations,
        )
        return found.labels

    def _marked(self, activations: Activations | None) -> torch.Tensor:
        given = required(activations, self.name)
        if given not in self._marks:
            self._marks[given] = markers(given, self.parameters.k_act)
        return self._marks[given]


def markers(activations: Activations, k_act: int) -> torch.Tensor:
    """Return int32 ``[T, min(k_act, F)]``: each token's neurons of largest ``|h|``, with tokens and rows at length one."""
    neurons, marks = Neurons(activations.ffn, unit_rows=True), min(k_act, activations.ffn.intermediate_size)
    found = []
    for batch in activations.batches():
        strength = neurons.of_directions(batch.x).abs()
        found.append(strength.topk(marks, dim=1).indices.to(torch.int32))
    return torch.cat(found)
