"""What each routed expert adds to a layer's output, and how much of the largest additions a router catches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ZERO_NEURON, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.router_network import RouterNetwork

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
        captured: energy of the router's choices over that of the oracle's, which chooses for every token the experts with the
            largest energy, as many as the router does.
        random: the same of uniformly random choices, expected.
        oracle_share: energy of the oracle's choices over that of all routed experts.
        chosen: the share of the routed experts that run, over all tokens.
    """

    captured: float
    random: float
    oracle_share: float
    chosen: float


def captured(activations: Activations, blueprint: LayerBlueprint, router: RouterNetwork | torch.Tensor) -> Capture:
    """Measure a router, or the rows ``[E, d]`` of one, on the held-out tokens (on all, if none are), weighted by ``batch.weight``."""
    expert_map, rule = ExpertMap(blueprint, activations.ffn), blueprint.rule
    if isinstance(router, torch.Tensor):
        router = RouterNetwork(router.float())
    experts = expert_map.experts
    # Energies of the router's choice, of the oracle's, of a random one, and of all; choices; tokens.
    sums = torch.zeros(6, dtype=torch.float64)
    for batch in activations.judged():
        energies = expert_map.energies(batch.hidden).double()
        logits = router.logits(batch.x)
        on = of_largest(logits, blueprint.top_k) if rule is None else (rule.gates(logits) > 0).float()
        counts = on.sum(1).long()
        largest = functional.pad(energies.sort(dim=1, descending=True).values.cumsum(1), (1, 0))
        total = energies.sum(1)
        oracle = largest.gather(1, counts[:, None]).squeeze(1)
        parts = (
            (energies * on).sum(1),
            oracle,
            counts / experts * total,
            total,
            counts.double(),
            torch.ones_like(total),
        )
        sums += torch.stack([batch.weight.double() @ part for part in parts])
    mine, oracle_sum, by_chance, whole, chosen, tokens = sums.tolist()
    share = chosen / (tokens * experts) if tokens else 1.0
    if oracle_sum == 0:
        return Capture(1.0, 1.0, 1.0, share)
    return Capture(mine / oracle_sum, by_chance / oracle_sum, oracle_sum / whole, share)
