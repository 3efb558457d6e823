"""Routers with a hidden layer: targets, losses and a step of training restated in fp64, and what is kept of the training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ZERO_NEURON
from upcycle.ffn.router_capture import ExpertMap
from upcycle.ffn.router_network import RouterNetwork
from upcycle.routers.calibrated.d2d_norms import NormParameters, NormRouter
from upcycle.routers.calibrated.hidden_layer import HiddenLayerRouter, _rate
from upcycle.routers.calibrated.moefication import MoeficationParameters, MoeficationRouter

T, RATE = 64, 0.01


def silu(z: np.ndarray) -> np.ndarray:
    return z / (1 + np.exp(-z))


def hidden_of(planted: Any, x: np.ndarray) -> np.ndarray:
    ffn = planted.ffn
    return silu(x @ ffn.gate.double().numpy().T) * (x @ ffn.up.double().numpy().T)


def members(planted: Any) -> list[np.ndarray]:
    return [e.neurons[e.neurons != ZERO_NEURON].numpy() for e in planted.blueprint.routed]


def norms(planted: Any, x: np.ndarray) -> np.ndarray:
    """``||E_i(x)||``, expert by expert."""
    hidden, down = hidden_of(planted, x), planted.ffn.down.double().numpy()
    return np.stack([np.linalg.norm(hidden[:, i] @ down[:, i].T, axis=1) for i in members(planted)], axis=1)


def masses(planted: Any, x: np.ndarray) -> np.ndarray:
    hidden = hidden_of(planted, x)
    return np.stack([np.abs(hidden[:, i]).sum(1) for i in members(planted)], axis=1)


def first_step(
    router: HiddenLayerRouter, planted: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[RouterNetwork, RouterNetwork]:
    """The router after and before one step on ``T`` tokens, as conversions run: without gradients by default."""
    begun: list[RouterNetwork] = []
    own = router.start

    def start(*given: Any) -> RouterNetwork:
        begun.append(own(*given))
        return begun[0]

    merits = iter([0.0, 1.0])  # so that the step is kept
    monkeypatch.setattr(router, "start", start)
    monkeypatch.setattr(router, "merit", lambda *_: next(merits))
    activations = Activations.of(planted.ffn, planted.tokens(T, 1))
    with torch.no_grad():
        made = router.network(planted.blueprint, planted.ffn, torch.Generator().manual_seed(0), activations)
    return made, begun[0]


def stepped(weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Adam's first step: both moments are corrected to the gradient and its square."""
    return weight - RATE * gradient / (np.abs(gradient) + 1e-8)


def test_a_step_towards_norms_is_that_of_the_formula(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    after, begun = first_step(NormRouter(NormParameters(width=7, epochs=1, learning_rate=RATE)), planted, monkeypatch)
    x = planted.tokens(T, 1).double().numpy()
    y, size = norms(planted, x), math.sqrt((x**2).mean())
    unit = y.mean()
    x, y = x / size, y / unit
    assert begun.hidden is not None
    first, second = begun.hidden.double().numpy(), begun.rows.double().numpy()
    before = x @ first.T
    inner = np.maximum(before, 0)
    z = inner @ second.T
    slope = 2 * (np.abs(z) - y) * np.sign(z) / z.size
    first_slope = ((slope @ second) * (before > 0)).T @ x
    assert after.hidden is not None
    # fp32 sums; a step is RATE long whatever the gradient is, so that only gradients near 0 could differ.
    expected = stepped(first, first_slope) / size, stepped(second, slope.T @ inner) * unit
    np.testing.assert_allclose(after.hidden.double().numpy(), expected[0], atol=0.02 * RATE / size)
    np.testing.assert_allclose(after.rows.double().numpy(), expected[1], atol=0.02 * RATE * unit)


def test_a_step_towards_masses_is_that_of_the_formula(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    router = MoeficationRouter(MoeficationParameters(epochs=1, learning_rate=RATE))
    after, begun = first_step(router, planted, monkeypatch)
    x = planted.tokens(T, 1).double().numpy()
    target = masses(planted, x)
    target = target / target.max()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    rows = planted.ffn.gate.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    first = np.stack([rows[i].mean(0) for i in members(planted)])
    assert begun.hidden is not None
    assert after.hidden is not None
    np.testing.assert_allclose(begun.hidden.double().numpy(), first, atol=1e-6)
    second = np.eye(len(first))
    inner = np.tanh(x @ first.T)
    z = inner @ second.T
    slope = (1 / (1 + np.exp(-z)) - target) / z.size
    first_slope = ((slope @ second) * (1 - inner**2)).T @ x
    np.testing.assert_allclose(after.hidden.double().numpy(), stepped(first, first_slope), atol=0.02 * RATE)
    np.testing.assert_allclose(after.rows.double().numpy(), stepped(second, slope.T @ inner), atol=0.02 * RATE)


def test_targets_are_those_of_the_formula(planted: Any) -> None:
    x = planted.tokens(T, 2)
    (batch,) = Activations.of(planted.ffn, x).batches()
    experts = ExpertMap(planted.blueprint, planted.ffn)
    for router, by_hand in (
        (NormRouter(NormParameters()), norms),
        (MoeficationRouter(MoeficationParameters()), masses),
    ):
        found = router.targets(batch, experts).double().numpy()  # type: ignore[attr-defined]
        np.testing.assert_allclose(found, by_hand(planted, x.double().numpy()), rtol=1e-5)


def test_norms_are_predicted(planted: Any) -> None:
    """Of tokens that were not trained on: the error is a small part of the norms' own variance."""
    router = NormRouter(NormParameters(epochs=60)).network(
        planted.blueprint, planted.ffn, torch.Generator().manual_seed(0), planted.activations(4000)
    )
    x = planted.tokens(500, 9)
    expected = norms(planted, x.double().numpy())
    error = ((router.logits(x).numpy() - expected) ** 2).mean() / expected.var(0).mean()
    assert error < 0.05
    assert (router.logits(x) >= 0).all()


def test_the_epoch_that_judges_best_is_kept(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def merit(logits: torch.Tensor, _: Any) -> float:
        seen.append(logits.clone())
        return [0.1, 0.2, 0.9, 0.9, 0.3][len(seen) - 1]

    router = MoeficationRouter(MoeficationParameters(epochs=4))
    monkeypatch.setattr(router, "merit", merit)
    activations = planted.activations()
    found = router.network(planted.blueprint, planted.ffn, torch.Generator().manual_seed(0), activations)
    assert len(seen) == 5
    x = torch.cat([batch.x for batch in activations.batches() if batch.held_out])
    assert torch.equal(found.logits(x), seen[2])
    assert not torch.equal(seen[2], seen[3])


def test_rates_fall_from_one_to_zero() -> None:
    assert (_rate(0), _rate(1)) == (1.0, 0.0)
    assert _rate(0.5) == pytest.approx(0.5)


def test_training_asks_for_no_gradients_outside(planted: Any) -> None:
    with torch.no_grad():
        found = NormRouter(NormParameters(epochs=1)).network(
            planted.blueprint, planted.ffn, torch.Generator(), planted.activations()
        )
        assert not torch.is_grad_enabled()
    assert not found.rows.requires_grad
