"""Centres of weights by loops; centres of inputs by every assignment there is."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import torch

from upcycle.ffn.blueprint import ZERO_NEURON
from upcycle.routers.calibrated.centroid import _matched, input_centres, weight_centres


def test_weight_centres(planted: Any) -> None:
    centres = weight_centres(planted.blueprint, planted.ffn)
    for e, expert in enumerate(planted.blueprint.routed):
        rows = [planted.ffn.gate[j].double() for j in expert.neurons if j != ZERO_NEURON]
        torch.testing.assert_close(centres[e], sum(row / row.norm() for row in rows) / len(rows))


def test_input_centres_are_the_planted_directions(planted: Any) -> None:
    centres = input_centres(planted.activations(), 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(4))
    # A token is 3 along its own direction and 2 along the constant one; the others average out.
    wanted = (3 * planted.basis[:4] + 2 * planted.basis[4]) / 13**0.5
    assert (wanted @ centres.T).max(dim=1).values.min() > 0.99


def test_batches_smaller_than_the_number_of_clusters(planted: Any) -> None:
    activations = planted.activations(400)
    centres = input_centres(activations, 90, torch.Generator().manual_seed(0))
    assert torch.isfinite(centres).all()


def test_matching_captures_the_most(planted: Any) -> None:
    # Centres that know nothing of the experts, so that no assignment is obviously right.
    centres = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    activations, down = planted.activations(), planted.ffn.down.double()
    gains = {}
    for order in permutations(range(4)):
        gains[order] = 0.0
        for batch in activations.batches():
            if batch.held_out:
                continue
            chosen = (batch.x @ centres[list(order)].T).argmax(dim=1)  # top-1
            parts = (batch.hidden.double() * down.norm(dim=0)).square()
            for e, expert in enumerate(planted.blueprint.routed):
                gains[order] += parts[chosen == e][:, expert.neurons[expert.neurons != ZERO_NEURON]].sum().item()
    assert tuple(_matched(activations, planted.blueprint, centres).tolist()) == max(gains, key=lambda o: gains[o])
