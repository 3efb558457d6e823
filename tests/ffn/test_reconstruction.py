"""Block reconstruction against the formula in fp64 (numpy, and gradients by finite differences), and where it must not help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from ffn_forms import FORMS, Arrays, arrays, ffn_of, neurons

from upcycle.ffn.activations import HELD_OUT_EVERY, Inputs
from upcycle.ffn.blueprint import ZERO_NEURON, ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.form import FfnForm
from upcycle.ffn.reconstruction import BlockSchedule, LayerFunction, reconstruct

D, F, T, K, BATCH = 6, 12, 1024, 2, 64
SHARED, ROUTED = ([0, 1, 2],), ([3, 4, 5], [6, 7, ZERO_NEURON], [8, 9, 10])
HELD = [j for each in (*SHARED, *ROUTED) for j in each]
SCHEDULE = BlockSchedule(passes=8, batch=32, rate=0.03)
FORM = pytest.mark.parametrize(
    "form",
    [FORMS["gated"], FORMS["gated, biases"], FORMS["ungated, biases"]],
    ids=["gated", "gated, biases", "ungated"],
)


class Case:
    """A layer that runs one shared and two of three routed experts, towards the whole FFN's output on random tokens."""

    def __init__(self, form: FfnForm) -> None:
        rng = np.random.default_rng(6)
        self.form = form
        self.ffn: FeedForward = ffn_of(form, F, D, dtype=torch.float32)
        specs = [tuple(ExpertSpec(torch.tensor(each)) for each in kind) for kind in (ROUTED, SHARED)]
        router = torch.from_numpy(rng.standard_normal((3, D))).float()
        self.blueprint = LayerBlueprint(3, specs[0], K, float(K), specs[1], router)
        self.x = torch.from_numpy(rng.standard_normal((T, D))).float()
        own, x = arrays(self.ffn), self.x.double().numpy()
        self.targets = torch.from_numpy(
            neurons(own, form.activation, x) @ own["down"].T + own.get("down_bias", 0.0)
        ).float()

    def batches(self) -> Iterator[tuple[Inputs, torch.Tensor]]:
        """All tokens, every eighth batch held out."""
        for number, (x, target) in enumerate(zip(self.x.split(BATCH), self.targets.split(BATCH), strict=True)):
            yield Inputs(x, torch.ones(len(x)), number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1), target

    def output(self, blueprint: LayerBlueprint, x: np.ndarray) -> np.ndarray:
        """The layer by the formula: neuron by neuron, times 1 where its expert runs, and the down bias."""
        own = arrays(self.ffn)
        there = np.array([j != ZERO_NEURON for j in HELD])
        taken: dict[str, np.ndarray] = {}
        for name in self.form.matrices:
            fitted = blueprint.fitted(name)
            dense = own[name][:, HELD] * there if name == "down" else own[name][HELD] * there[:, None]
            taken[name] = dense if fitted is None else fitted.double().numpy()
            if name != "down" and f"{name}_bias" in own:
                taken[f"{name}_bias"] = own[f"{name}_bias"][HELD] * there
        assert blueprint.router is not None
        chosen = np.argsort(-(x @ blueprint.router.double().numpy().T), axis=1)[:, :K]
        on = np.zeros((len(x), 3))
        on[np.arange(len(x))[:, None], chosen] = 1.0
        running = np.concatenate([np.ones((len(x), 3)), on.repeat(3, axis=1)], axis=1)
        weights: Arrays = taken
        return neurons(weights, self.form.activation, x) * running @ taken["down"].T + own.get("down_bias", 0.0)

    def error(self, blueprint: LayerBlueprint) -> float:
        """``||target - output||^2 / ||target - c||^2`` over held-out tokens."""
        held = np.arange(T) // BATCH % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        wanted = self.targets.double().numpy()[held]
        left = wanted - self.output(blueprint, self.x.double().numpy()[held])
        return float((left**2).sum() / ((wanted - arrays(self.ffn).get("down_bias", 0.0)) ** 2).sum())


@FORM
def test_the_layer_that_is_trained_is_the_formula(form: FfnForm) -> None:
    case = Case(form)
    layer = LayerFunction(case.ffn, case.blueprint)
    expected = case.output(case.blueprint, case.x.double().numpy())
    found = layer.output(case.x).double().numpy()
    # fp32 sums of at most D + 12 terms, of numbers as large as the largest output.
    assert np.abs(found - expected).max() <= 64 * 2.0**-24 * np.abs(expected).max()
    assert layer.error(case.batches()) == pytest.approx(case.error(case.blueprint), rel=1e-4)


@FORM
def test_gradients_are_those_of_the_formula(form: FfnForm) -> None:
    case = Case(form)
    layer = LayerFunction(case.ffn, case.blueprint)
    x, wanted = case.x[:40], case.targets[:40]
    for weight in layer.weights:
        weight.requires_grad_()
    loss = (layer(x) + (0.0 if layer.bias is None else layer.bias) - wanted).square().sum()
    loss.backward()

    def formula(stored: LayerBlueprint) -> float:
        return float(((case.output(stored, x.double().numpy()) - wanted.double().numpy()) ** 2).sum())

    rng, step = np.random.default_rng(1), 2.0**-8
    start = layer.stored(case.blueprint, torch.float64)
    for name, weight in zip(form.matrices, layer.weights, strict=True):
        assert weight.grad is not None
        gradient = (weight.grad.T if name == "down" else weight.grad).double().numpy()
        values = start.fitted(name)
        assert values is not None
        direction = torch.from_numpy(rng.standard_normal(values.shape)).double()
        (direction.T if name == "down" else direction)[8] = 0.0  # the zero neuron stays zero
        moved = []
        for factor in (-step, step):
            shifted = {each: start.fitted(each) for each in form.matrices} | {name: values + factor * direction}
            moved.append(formula(_with(start, shifted)))
        slope = (moved[1] - moved[0]) / (2 * step)
        assert float((gradient * direction.numpy()).sum()) == pytest.approx(slope, rel=2e-3)


def _with(blueprint: LayerBlueprint, tensors: dict[str, torch.Tensor | None]) -> LayerBlueprint:
    return replace(blueprint, gate=tensors.get("gate"), up=tensors["up"], down=tensors["down"])


@FORM
def test_training_lowers_the_held_out_error_and_says_by_how_much(form: FfnForm) -> None:
    case = Case(form)
    found, fit = reconstruct(case.blueprint, case.ffn, case.batches, SCHEDULE, torch.Generator().manual_seed(0))
    assert fit.reason is None
    assert fit.steps == 8 * 14 * 2  # passes, batches that are not held out, steps in each
    assert fit.trained_error == pytest.approx(case.error(found), rel=1e-3)
    assert case.error(found) < 0.8 * case.error(case.blueprint)
    assert (found.gate is None) == (not form.gated)
    zero = found.neurons == ZERO_NEURON
    assert found.up is not None
    assert found.down is not None
    assert not found.up[zero].any()
    assert not found.down[:, zero].any()


def test_the_same_seed_gives_the_same_bits_and_no_input_changes() -> None:
    case = Case(FORMS["gated"])
    before = {name: tensor.clone() for name in ("gate", "up", "down") if (tensor := case.ffn.tensor(name)) is not None}
    made = [
        reconstruct(case.blueprint, case.ffn, case.batches, SCHEDULE, torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    ]
    for name, tensor in before.items():
        fitted = [each.fitted(name) for each in made]
        assert torch.equal(fitted[0], fitted[1])
        assert not torch.equal(fitted[0], fitted[2])
        assert torch.equal(case.ffn.tensor(name), tensor)
    assert case.blueprint.up is None


@pytest.mark.parametrize(
    ("rate", "poison", "message"),
    [(0.9, 1.0, "rose from"), (0.03, float("nan"), "the loss was not finite at step"), (1e-12, 1.0, "held-out error")],
    ids=["diverges", "not finite", "does not help"],
)
def test_a_layer_that_training_does_not_help_keeps_its_closed_form(rate: float, poison: float, message: str) -> None:
    case = Case(FORMS["gated"])
    case.targets[BATCH] *= poison
    schedule = BlockSchedule(passes=8, batch=32, rate=rate)
    found, fit = reconstruct(case.blueprint, case.ffn, case.batches, schedule, torch.Generator().manual_seed(0))
    assert found is case.blueprint
    assert fit.reason is not None
    assert message in fit.reason
    assert fit.as_dict()["not_trained"] == fit.reason


def test_each_expert_learns_from_its_own_tokens_alone() -> None:
    case = Case(FORMS["gated"])
    layer = LayerFunction(case.ffn, case.blueprint)
    assert case.blueprint.router is not None
    chosen = (case.x @ case.blueprint.router.T).topk(K, dim=1).indices
    without = (chosen != 1).all(1)  # tokens that do not run the second routed expert
    for weight in layer.weights:
        weight.requires_grad_()
    layer(case.x[without]).square().sum().backward()
    for weight in layer.weights:
        assert weight.grad is not None
        assert not weight.grad[6:9].any()
        assert weight.grad[3:6].any()
        assert weight.grad[9:12].any()
