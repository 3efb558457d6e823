"""Ridge rows against numpy's least squares, targets against loops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch.nn.functional import linear, silu

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ZERO_NEURON, ExpertSpec
from upcycle.ffn.ridge_sums import UNJUDGED_STRENGTH
from upcycle.ffn.router_capture import ExpertMap
from upcycle.routers.calibrated.ridge import RidgeParameters, RidgeRouter, RidgeTarget, targets


def target_by_loops(kind: str, planted: Any, blueprint: Any, x: torch.Tensor) -> torch.Tensor:
    ffn = planted.ffn
    gate, up, down = ffn.gate.double(), ffn.up.double(), ffn.down.double()
    result = torch.zeros(len(x), 4, dtype=torch.float64)
    for t, token in enumerate(x.double()):
        h = silu(gate @ token) * (up @ token)
        real = [[int(j) for j in e.neurons if j != ZERO_NEURON] for e in blueprint.routed]
        energy = [sum((h[j] * down[:, j].norm()).item() ** 2 for j in e) for e in real]
        outputs = [sum((h[j] * down[:, j] for j in e), torch.zeros(24).double()) for e in real]
        dense = down @ h - sum(h[j] * down[:, j] for e in blueprint.shared for j in e.neurons)
        if kind == "output_norm":
            result[t] = torch.stack([output.norm() for output in outputs])
        elif kind in ("one_hot", "prior_approximate"):
            error = [((output - 2 / 4 * dense) ** 2).mean().item() for output in outputs]
            score = energy if kind == "one_hot" else [-e for e in error]
            result[t, sorted(range(4), key=lambda e: score[e])[2:]] = 1
        else:
            result[t] = torch.tensor(energy) ** (1 if kind == "energy" else 0.5)
    return result


@pytest.mark.parametrize("kind", get_args(RidgeTarget))
@pytest.mark.parametrize("shared", [False, True])
def test_targets(planted: Any, kind: RidgeTarget, shared: bool) -> None:
    blueprint = replace(planted.blueprint, top_k=2)
    if shared:  # takes two neurons from the routed experts
        taken = blueprint.routed[0].neurons[:2]
        routed = (replace(blueprint.routed[0], neurons=blueprint.routed[0].neurons[2:]),)
        rest = (replace(e, neurons=e.neurons[:-2]) for e in blueprint.routed[1:])
        blueprint = replace(blueprint, routed=(*routed, *rest), shared=(ExpertSpec(taken),))
    x = planted.tokens(20, seed=3)
    (batch,) = Activations.of(planted.ffn, x).batches()
    found = targets(kind, batch, blueprint, planted.ffn, ExpertMap(blueprint, planted.ffn))
    torch.testing.assert_close(
        found.double(), target_by_loops(kind, planted, blueprint, x), rtol=1e-4, atol=1e-4, check_dtype=False
    )


def test_directions_are_the_least_squares_of_centred_targets_without_a_bias(planted: Any) -> None:
    x = planted.tokens(300, seed=3)
    activations = Activations.of(planted.ffn, x)  # one batch, so none is held out
    router = RidgeRouter(RidgeParameters())
    rows = router.directions(planted.blueprint, planted.ffn, torch.Generator(), activations)
    target = target_by_loops("contribution", planted, planted.blueprint, x)
    target -= target.mean(dim=1, keepdim=True)
    x = x.double()
    ridge = (UNJUDGED_STRENGTH * x.square().sum() / 24).sqrt() * torch.eye(24)
    expected = np.linalg.lstsq(torch.cat([x, ridge]).numpy(), torch.cat([target, torch.zeros(24, 4)]).numpy())[0]
    # The router's targets are fp32.
    np.testing.assert_allclose(rows.T.numpy(), expected, rtol=0, atol=1e-5)


def test_a_bias_is_carried_by_the_constant_direction(planted: Any) -> None:
    # One expert contributes a constant more than the others: no direction of the tokens but the constant one says so.
    x = planted.tokens(300, seed=3)
    experts = planted.blueprint.routed[0].neurons[:-2]
    up = planted.ffn.up.clone()
    up[experts] *= 3
    ffn = replace(planted.ffn, up=up)
    activations = Activations.of(ffn, x)
    rows = RidgeRouter(RidgeParameters()).directions(planted.blueprint, ffn, torch.Generator(), activations)
    along = linear(planted.basis[4].double(), rows)
    assert along.argmax() == 0
