"""Refits against least squares in fp64, written from the formula: activations, router, down bias and ridge by numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from ffn_forms import FORMS, arrays, ffn_of, neurons

from upcycle.errors import CheckpointError
from upcycle.ffn.activations import Activations, ExpertActivations
from upcycle.ffn.blueprint import ZERO_NEURON, ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.form import FfnForm
from upcycle.ffn.refit import REFIT_STRENGTHS, Routing, fit_down, fit_scale

D, F, T, K, BATCH = 5, 12, 640, 2, 16
SHARED, ROUTED = ([0, 1, 2],), ([3, 4, 5], [6, 7, ZERO_NEURON], [8, 9, 10])
FORM = pytest.mark.parametrize(
    "form",
    [FORMS["gated"], FORMS["gated, biases"], FORMS["ungated, biases"]],
    ids=["gated", "gated, biases", "ungated"],
)


class Case:
    """A layer of three experts, two of them chosen, on random tokens; and its targets in fp64."""

    def __init__(self, form: FfnForm) -> None:
        rng = np.random.default_rng(6)
        self.ffn: FeedForward = ffn_of(form, F, D, dtype=torch.float32)
        specs = [tuple(ExpertSpec(torch.tensor(each)) for each in kind) for kind in (ROUTED, SHARED)]
        router = torch.from_numpy(rng.standard_normal((3, D))).float()
        self.blueprint = LayerBlueprint(3, specs[0], K, float(K), specs[1], router)
        self.x = torch.from_numpy(rng.standard_normal((T, D))).float()
        x, own = self.x.double().numpy(), arrays(self.ffn)
        hidden = neurons(own, form.activation, x)
        self.bias = own.get("down_bias", np.zeros(D))
        noise = 0.1 * rng.standard_normal((T, D)) * hidden.std()
        self.targets = hidden @ own["down"].T + self.bias + noise
        held = [j for each in (*SHARED, *ROUTED) for j in each]
        there = np.array([j != ZERO_NEURON for j in held])
        chosen = np.argsort(-(x @ router.double().numpy().T), axis=1)[:, :K]
        on = np.zeros((T, 3))
        on[np.arange(T)[:, None], chosen] = 1.0
        self.active = hidden[:, held] * there * np.concatenate([np.ones((T, 3)), on.repeat(3, axis=1)], axis=1)
        self.down = own["down"][:, held] * there
        self.held_out = np.arange(T) // BATCH % 8 == 7

    def started(self) -> tuple[Routing, ExpertActivations, list[torch.Tensor]]:
        """The layer as it is refitted, its activations, and the targets in batches."""
        routing = Routing(self.blueprint, self.ffn)
        active = ExpertActivations(Activations.of(self.ffn, self.x, batch=BATCH), routing.active)
        return routing, active, list(torch.from_numpy(self.targets).float().split(BATCH))

    def error(self, down: np.ndarray) -> float:
        """``||target - c - W a||^2 / ||target - c||^2`` over held-out tokens."""
        wanted = (self.targets - self.bias)[self.held_out]
        left = wanted - self.active[self.held_out] @ down.T
        return float((left**2).sum() / (wanted**2).sum())

    def ridge(self, strength: float, which: np.ndarray) -> np.ndarray:
        """``W + D``, D minimising the refit's sum over ``which`` tokens."""
        a, left = self.active[which], (self.targets - self.bias - self.active @ self.down.T)[which]
        gram = a.T @ a
        return self.down + np.linalg.solve(gram + strength * gram.diagonal().mean() * np.eye(len(gram)), a.T @ left).T


@FORM
def test_the_layer_that_is_refitted_is_the_formula(form: FfnForm) -> None:
    case = Case(form)
    routing, active, _ = case.started()
    found = np.concatenate([batch.hidden.numpy() for batch in active.batches()])
    np.testing.assert_allclose(found, case.active, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(routing.down.double().numpy(), case.down)
    np.testing.assert_array_equal(routing.bias.double().numpy() if routing.bias is not None else np.zeros(D), case.bias)


@FORM
def test_down_is_the_ridge_solution_of_what_the_bias_leaves(form: FfnForm) -> None:
    case = Case(form)
    routing, active, targets = case.started()
    found, report = fit_down(routing, active, targets)
    losses = {strength: case.error(case.ridge(strength, ~case.held_out)) for strength in REFIT_STRENGTHS}
    assert report.strength is not None
    assert losses[report.strength] <= min(losses.values()) * (1 + 1e-3)
    expected = case.ridge(report.strength, np.ones(T, dtype=bool))
    # Products in fp32, and a solution that fp32's rounding of the activations moves by about their condition number.
    assert np.linalg.norm(found.double().numpy() - expected) < 1e-3 * np.linalg.norm(expected)
    assert report.error_before == pytest.approx(case.error(case.down), rel=1e-3)
    assert report.error_after == pytest.approx(losses[report.strength], rel=1e-2)
    assert report.error_after < report.error_before


@FORM
def test_scale_is_the_least_squares_factor_of_what_bias_and_shared_experts_leave(form: FfnForm) -> None:
    case = Case(form)
    routing, active, targets = case.started()
    found, report = fit_scale(routing, active, targets)
    shared, routed = case.active[:, :3] @ case.down[:, :3].T, case.active[:, 3:] @ case.down[:, 3:].T
    left = case.targets - case.bias - shared
    expected = (left * routed).sum() / (routed**2).sum()
    assert found == pytest.approx(expected, rel=1e-4)
    assert report.factor == found
    fitted = np.concatenate([case.down[:, :3], expected * case.down[:, 3:]], axis=1)
    assert report.error_before == pytest.approx(case.error(case.down), rel=1e-3)
    assert report.error_after == pytest.approx(case.error(fitted), rel=1e-3)


def test_what_is_stored_has_the_scale_over_top_k_on_routed_neurons_alone() -> None:
    case = Case(FORMS["gated"])
    routing = Routing(case.blueprint, case.ffn)
    assert routing.stored(case.blueprint) is routing.down
    tripled = routing.stored(replace(case.blueprint, scale=3.0 * K)).numpy()
    np.testing.assert_allclose(tripled, case.down * ([1.0] * 3 + [3.0] * 9), rtol=1e-6)
    other = torch.ones(D, F)
    assert torch.equal(routing.stored(replace(case.blueprint, down=other)), other)


def test_experts_that_say_nothing_keep_their_scale() -> None:
    case = Case(FORMS["gated"])
    routing, active, _ = case.started()
    shared = (case.active[:, :3] @ case.down[:, :3].T).astype(np.float32)
    # Targets that point away from the routed experts' output would ask for a factor below zero.
    routed = torch.from_numpy((case.active[:, 3:] @ case.down[:, 3:].T).astype(np.float32))
    away = [torch.from_numpy(s) - r for s, r in zip(np.split(shared, T // BATCH), routed.split(BATCH), strict=True)]
    assert fit_scale(routing, active, away)[0] == 1.0


@pytest.mark.parametrize("fit", [fit_down, fit_scale])
def test_targets_that_are_not_finite_name_the_layer(fit: object) -> None:
    routing, active, targets = Case(FORMS["gated, biases"]).started()
    targets[3][2, 1] = torch.inf
    with pytest.raises(CheckpointError, match="layer 3"):
        fit(routing, active, targets)  # type: ignore[operator]
