"""The alternating split against explicit loops, and on a layer whose experts are known."""

from __future__ import annotations

import numpy as np
import torch

from upcycle.calibration.decide_layer import generator
from upcycle.ffn.activations import Activations
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.ffn.router_capture import captured
from upcycle.routers.calibrated.ridge import RidgeParameters, RidgeRouter
from upcycle.splitters.alternating import Alternating, AlternatingParameters, _BatchSums

D, GROUPS, PER_GROUP, ALWAYS = 12, 4, 6, 6


def planted() -> tuple[FeedForward, torch.Tensor, torch.Tensor]:
    """Neurons that are active on one kind of token each, some that always are, and the group of each (-1: always)."""
    rng = torch.Generator().manual_seed(3)
    group = torch.cat([torch.full((ALWAYS,), -1), torch.arange(GROUPS).repeat_interleave(PER_GROUP)])
    group = group[torch.randperm(len(group), generator=rng)]
    gate = torch.full((len(group), D), 0.0)
    for neuron, which in enumerate(group.tolist()):
        gate[neuron, GROUPS] = 4.0 if which < 0 else -8.0  # input GROUPS is always one
        if which >= 0:
            gate[neuron, which] = 12.0
    up = torch.zeros(len(group), D)
    up[:, GROUPS] = 1.0
    down = torch.randn(D, len(group), generator=rng)
    down /= down.norm(dim=0)
    kinds = torch.randint(GROUPS, (640,), generator=rng)
    x = torch.randn(640, D, generator=rng) * 0.05
    x[:, GROUPS] = 1.0
    x[torch.arange(640), kinds] += 1.0
    return FeedForward(0, gate, up, down, torch.ones(D), "silu"), x, group


def test_planted_experts_are_found() -> None:
    ffn, x, group = planted()
    shape = MoeShape(GROUPS, 1, 1, PER_GROUP, (0,))
    activations = Activations.of(ffn, x, batch=80)
    blueprint = Alternating(AlternatingParameters()).blueprint(ffn, shape, 1.0, generator(0, 0, "method"), activations)
    assert set(group[blueprint.shared[0].neurons].tolist()) == {-1}
    assert {tuple(set(group[expert.neurons].tolist())) for expert in blueprint.routed} == {(g,) for g in range(GROUPS)}
    rows = RidgeRouter(RidgeParameters()).rows(blueprint, ffn, generator(0, 0, "router"), activations)
    assert captured(activations, blueprint, rows).captured > 0.99


def random_layer(seed: int = 5) -> tuple[FeedForward, Activations]:
    rng = torch.Generator().manual_seed(seed)
    shapes = ((24, D), (24, D), (D, 24))
    ffn = FeedForward(0, *(torch.randn(shape, generator=rng) for shape in shapes), torch.ones(D), "silu")
    return ffn, Activations.of(ffn, torch.randn(300, D, generator=rng), batch=64)


def test_gain_is_what_a_neuron_would_add_where_the_router_finds_it() -> None:
    ffn, activations = random_layer()
    shape = MoeShape(3, 2, 1, 6, (0,))
    piece = torch.arange(24) % 4
    method = Alternating(AlternatingParameters(strength=1e-2))
    found = method._gain(_BatchSums(activations, ffn, 10**6), activations, piece, shape).numpy()

    batches = list(activations.batches())
    x = torch.cat([batch.x for batch in batches]).double().numpy()
    h = torch.cat([batch.hidden for batch in batches]).double().numpy()
    c = np.abs(h) * np.linalg.norm(ffn.down.double().numpy(), axis=0)
    target = np.stack([c[:, piece.numpy() == e + 1].sum(1) for e in range(3)], axis=1)
    gram = x.T @ x
    ridge = 1e-2 * np.trace(gram) / D * np.eye(D)
    rows = np.linalg.solve(gram + ridge, x.T @ (target - target.mean(1, keepdims=True)))
    order = np.argsort(-(x @ rows), axis=1)[:, :2]
    expected = np.zeros((24, 4))
    expected[:, 0] = (c**2).sum(0)
    for t, chosen in enumerate(order):
        for e in chosen:
            expected[:, 1 + e] += c[t] ** 2
    # fp32 sums of 300 squares.
    assert np.abs(found - expected).max() <= 1e-5 * expected.max()


def test_more_rounds_never_capture_less_and_sometimes_more() -> None:
    shape, improved = MoeShape(6, 2, 2, 3, (0,)), 0
    for seed in range(6):
        ffn, activations = random_layer(seed)
        shares = []
        for rounds in (0, 1, 8):
            method = Alternating(AlternatingParameters(rounds=rounds))
            blueprint = method.blueprint(ffn, shape, 1.0, generator(0, 0, "method"), activations)
            piece = torch.empty(24, dtype=torch.long)
            for number, expert in enumerate(blueprint.shared + blueprint.routed):
                piece[expert.neurons] = number
            gain = method._gain(_BatchSums(activations, ffn, 10**6), activations, piece, shape)
            shares.append(gain.gather(1, piece[:, None]).sum().item())
        assert shares[0] <= shares[1] <= shares[2]
        improved += shares[0] < shares[2]
    assert improved >= 1
