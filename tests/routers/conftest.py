"""A layer whose experts can be told apart by a linear map."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ZERO_NEURON, ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward

D, E, M = 24, 4, 6
F = E * M


@dataclass
class Planted:
    """Neurons of expert e answer to direction e; every token lies along one direction and a constant one."""

    ffn: FeedForward
    blueprint: LayerBlueprint
    basis: torch.Tensor

    def tokens(self, count: int, seed: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        along = torch.randn(count, E, generator=rng) * 0.3
        along[torch.arange(count), torch.randint(E, (count,), generator=rng)] += 3
        return along @ self.basis[:E] + 2 * self.basis[E] + 0.1 * torch.randn(count, D, generator=rng)

    def activations(self, count: int = 640, seed: int = 5) -> Activations:
        return Activations.of(self.ffn, self.tokens(count, seed), batch=40)


@pytest.fixture(scope="session")
def planted() -> Planted:
    rng = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(D, D, generator=rng)).Q
    order = torch.randperm(F, generator=rng)
    gate, up = torch.randn(2, F, D, generator=rng) * 0.1
    up += basis[E]
    experts = order.view(E, M)
    for e in range(E):
        gate[experts[e]] += 2 * basis[e]
    ffn = FeedForward(4, gate, up, torch.randn(D, F, generator=rng), torch.rand(D, generator=rng) + 0.5, "silu")
    zeros = torch.full((2,), ZERO_NEURON)
    blueprint = LayerBlueprint(4, tuple(ExpertSpec(torch.cat([neurons, zeros])) for neurons in experts), 1, 1.0)
    return Planted(ffn, blueprint, basis)
