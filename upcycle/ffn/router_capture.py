"""What each routed expert adds to a layer's output, and how much of the largest additions a router catches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ZERO_NEURON, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward

_OUTPUT_BYTES = 1 << 26  # outputs of several experts are computed at once up to this size


class ExpertMap:
    """Which neurons a layer's routed experts hold, ready to sum over them for whole batches.

    Experts may overlap; a neuron counts in every expert that holds it, ``ZERO_NEURON`` nowhere. Where the blueprint has
    refitted down projections, those are the experts' columns; otherwise the dense ones are. The down bias counts nowhere:
    every choice of experts adds all of it.
    """

    def __init__(self, blueprint: LayerBlueprint, ffn: FeedForward) -> None:
        neurons = torch.stack([expert.neurons for expert in blueprint.routed])
        self.present = neurons != ZERO_NEURON
        self.neurons = neurons.clamp(min=0)  # [E, m]
        self.experts, self.size = neurons.shape
        self._width = ffn.intermediate_size
        if blueprint.down is None:
            self._down, columns = ffn.down, self.neurons
        else:
            first = len(blueprint.shared) * self.size
            self._down, columns = blueprint.down, torch.arange(first, first + neurons.numel()).view_as(neurons)
        self._columns = columns
        self.norms = self._down.float().norm(dim=0)[columns] * self.present  # [E, m]
        self._squares = self.matrix(self.norms.square())

    def matrix(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` ``[E, m]`` by dense neuron, fp32 ``[F, E]``: ``f(hidden) @ matrix`` then sums by expert."""
        spread = torch.zeros(self._width, self.experts)
        experts = torch.arange(self.experts)[:, None].expand_as(self.neurons)
        return spread.index_put_((self.neurons, experts), (values * self.present).float(), accumulate=True)

    def energies(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 ``[t, E]`` for ``hidden`` ``[t, F]``: the sum over an expert's neurons of ``(h_j * ||down_j||)^2``."""
        return hidden.square() @ self._squares

    def outputs(self, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the experts' outputs for ``hidden`` ``[t, F]``, some experts at a time: fp32 ``[e, t, d]``, unscaled."""
        at_once = max(1, _OUTPUT_BYTES // max(1, 4 * len(hidden) * max(self._down.shape[0], self.size)))
        for first in range(0, self.experts, at_once):
            some = slice(first, min(first + at_once, self.experts))
            taken = hidden[:, self.neurons[some]].mul_(self.present[some]).transpose(0, 1)  # [e, t, m]
            down = self._down[:, self._columns[some]].float().permute(1, 2, 0)  # [e, m, d]
            yield some, taken @ down

    def output_norms(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 ``[t, E]`` for ``hidden`` ``[t, F]``: ``||E_i(x)||_2`` of the unscaled experts."""
        return torch.cat([outputs.norm(dim=-1) for _, outputs in self.outputs(hidden)]).T

    def errors(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return fp32 ``[t, E]``: the mean square of ``E_i(x) - target``, for ``hidden`` ``[t, F]`` and ``targets`` ``[t, d]``."""
        return torch.cat([(outputs - targets).square().mean(-1) for _, outputs in self.outputs(hidden)]).T


def of_largest(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return the multi-hot of the ``top_k`` largest in every row, in the shape and dtype of ``scores``."""
    return torch.zeros_like(scores).scatter_(1, scores.topk(top_k, dim=1, sorted=False).indices, 1.0)


@dataclass(frozen=True)
class Capture:
    """Shares of energy; all are 1 where there is no energy at all.

    Attributes:
        captured: energy of the router's choices over that of the oracle's, which chooses the k experts with the largest
            energy for every token.
        random: the same of uniformly random choices, expected.
        oracle_share: energy of the oracle's choices over that of all routed experts.
    """

    captured: float
    random: float
    oracle_share: float


def captured(activations: Activations, blueprint: LayerBlueprint, rows: torch.Tensor) -> Capture:
    """Measure router ``rows`` ``[E, d]`` on the held-out tokens (on all, if none are), weighted by ``batch.weight``."""
    expert_map = ExpertMap(blueprint, activations.ffn)
    rows = rows.float()
    sums = torch.zeros(3, dtype=torch.float64)  # the router's energy, the oracle's, and all there is
    for batch in activations.judged():
        energies = expert_map.energies(batch.hidden).double()
        chosen = linear(batch.x, rows).topk(blueprint.top_k, dim=1).indices
        by_choice = (energies.gather(1, chosen), energies.topk(blueprint.top_k, dim=1).values, energies)
        sums += torch.stack([batch.weight.double() @ part.sum(1) for part in by_choice])
    mine, oracle, total = sums.tolist()
    if oracle == 0:
        return Capture(1.0, 1.0, 1.0)
    return Capture(mine / oracle, blueprint.top_k / len(blueprint.routed) * total / oracle, oracle / total)
