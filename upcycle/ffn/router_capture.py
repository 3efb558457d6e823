"""What each routed expert adds to a layer's output, and how much of the largest additions a router catches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from upcycle.ffn.activations import Activations, Batch
from upcycle.ffn.blueprint import ZERO_NEURON, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward

_OUTPUT_BYTES = 1 << 26  # outputs of several experts are computed at once up to this size


class ExpertMap:
    """Which neurons a layer's routed experts hold, ready to sum over them for whole batches.

    Experts may overlap; a neuron counts in every expert that holds it, ``ZERO_NEURON`` nowhere. Where the blueprint has
    refitted down projections, those are the experts' columns; otherwise the dense ones are.
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
        """Spread ``values`` ``[E, m]`` over the dense neurons: fp32 ``[F, E]``, so that ``f(h) @ matrix`` sums by expert."""
        spread = torch.zeros(self._width, self.experts)
        experts = torch.arange(self.experts)[:, None].expand_as(self.neurons)
        return spread.index_put_((self.neurons, experts), (values * self.present).float(), accumulate=True)

    def energies(self, hidden: torch.Tensor) -> torch.Tensor:
        """Fp32 ``[t, E]`` from ``[t, F]``: the sum over an expert's neurons of ``(h_j * ||down_j||)^2``."""
        return hidden.square() @ self._squares

    def outputs(self, hidden: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """The exact outputs of some experts at a time, fp32 ``[e, t, d]``, unscaled, from ``[t, F]``."""
        at_once = max(1, _OUTPUT_BYTES // max(1, 4 * len(hidden) * max(self._down.shape[0], self.size)))
        for first in range(0, self.experts, at_once):
            some = slice(first, min(first + at_once, self.experts))
            taken = hidden[:, self.neurons[some]].mul_(self.present[some]).transpose(0, 1)  # [e, t, m]
            down = self._down[:, self._columns[some]].float().permute(1, 2, 0)  # [e, m, d]
            yield some, taken @ down

    def output_norms(self, hidden: torch.Tensor) -> torch.Tensor:
        """Fp32 ``[t, E]``: ``||E_i(x)||_2`` of the unscaled experts, from ``[t, F]``."""
        return torch.cat([outputs.norm(dim=-1) for _, outputs in self.outputs(hidden)]).T

    def errors(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Fp32 ``[t, E]``: the mean square over d of ``E_i(x) - target``, targets being ``[t, d]``."""
        return torch.cat([(outputs - targets).square().mean(-1) for _, outputs in self.outputs(hidden)]).T


def expert_energies(batch: Batch, blueprint: LayerBlueprint, ffn: FeedForward) -> torch.Tensor:
    """What each routed expert contributes: :meth:`ExpertMap.energies` of one batch, fp32 ``[t, E]``."""
    return ExpertMap(blueprint, ffn).energies(batch.hidden)


def output_norms(batch: Batch, blueprint: LayerBlueprint, ffn: FeedForward) -> torch.Tensor:
    """How long each routed expert's output is: :meth:`ExpertMap.output_norms` of one batch, fp32 ``[t, E]``."""
    return ExpertMap(blueprint, ffn).output_norms(batch.hidden)


def of_largest(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Multi-hot of the ``top_k`` largest in every row; same shape and dtype."""
    return torch.zeros_like(scores).scatter_(1, scores.topk(top_k, dim=1, sorted=False).indices, 1.0)


@dataclass(frozen=True)
class Capture:
    """Shares of energy. ``captured``: what the router's choices have of what the oracle's have, the oracle choosing the k
    experts with the largest energy for every token; ``random``: what uniformly random choices have of it, expected;
    ``oracle_share``: what the oracle's choices have of all routed experts'. All are 1 where there is no energy at all.
    """

    captured: float
    random: float
    oracle_share: float


def captured(activations: Activations, blueprint: LayerBlueprint, rows: torch.Tensor) -> Capture:
    """Measure router ``rows`` ``[E, d]`` on the held-out tokens (on all, if none are), weighted by ``batch.weight``."""
    expert_map = ExpertMap(blueprint, activations.ffn)
    rows = rows.float()
    sums = torch.zeros(3, dtype=torch.float64)  # router's, oracle's and all energy
    for batch in activations.judged():
        energies = expert_map.energies(batch.hidden).double()
        chosen = linear(batch.x, rows).topk(blueprint.top_k, dim=1).indices
        by_choice = (energies.gather(1, chosen), energies.topk(blueprint.top_k, dim=1).values, energies)
        sums += torch.stack([batch.weight.double() @ part.sum(1) for part in by_choice])
    mine, oracle, total = sums.tolist()
    if oracle == 0:
        return Capture(1.0, 1.0, 1.0)
    return Capture(mine / oracle, blueprint.top_k / len(blueprint.routed) * total / oracle, oracle / total)
