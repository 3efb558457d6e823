"""What every registered auxiliary loss promises. T tokens, E experts, K top-k."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from upcycle.models.own.routing.causal_choice import CausalChoiceRule
from upcycle.models.own.routing.relu import ReluRule
from upcycle.registry import LOSSES, load
from upcycle.trainers.distributed.reduction import Reduction
from upcycle.trainers.losses.base import Loss, Means, WholeBatch, auxiliary_losses
from upcycle.trainers.routing.neuron_records import ActivationRecord
from upcycle.trainers.routing.router_control import Noise
from upcycle.trainers.routing.router_records import RouterRecord
from upcycle.trainers.routing.routing_rule import RoutingRule, widened
from upcycle.trainers.routing.varying_rules import varying_rule

pytestmark = pytest.mark.one_in(3)  # the other cases are long

B, S, E, K = 4, 5, 6, 2
T = B * S
# What each loss is where all experts are equally loaded and every token is certain, times its coefficient 1.
AT_BALANCE = {
    "switch_balance": 1.0,
    "device_balance": 1.0,
    "cluster_variance": 0.0,
    "skywork_balance": 0.0,
    "importance_cv2": 0.0,
    "load_cv2": 0.0,
    "mutual_information": -torch.tensor(float(E), dtype=torch.float64).log().item(),
}
NOT_BALANCES = {"router_z", "hoyer", "relu_l1", "choice_prediction"}
VARYING = {
    "relu_l1",
    "choice_prediction",
}  # of routers that run a varying number of experts, whose choices are never dropped
DRAWN = torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
KEPT = torch.rand(T, K, generator=torch.Generator().manual_seed(11)) > 0.3
ALL = torch.ones(T, dtype=torch.bool)


def made(name: str, **parameters: Any) -> Loss:
    cls = load("loss", name)
    loss: Loss = cls(cls.Parameters(coefficient=1.0, **parameters))
    return loss


def recorded(loss: Loss, z: torch.Tensor, rows: torch.Tensor = ALL, score: Any = "softmax") -> Any:
    """As a pass over the tokens ``rows`` would record it: z are logits, or pre-activations of ReLU neurons."""
    if loss.reads == "activations":
        return ActivationRecord(0, z, z.relu())
    if loss.name == "choice_prediction":  # z is what the predictor says; who was chosen comes from elsewhere
        predicted = varying_rule(CausalChoiceRule(), E)
        assert predicted
        logits = DRAWN[rows].to(z.dtype)
        return RouterRecord(0, logits, *predicted.route(logits), predicted, correction=z)
    if loss.name in VARYING:
        varying = varying_rule(ReluRule(), E)
        assert varying
        return RouterRecord(0, z, *varying.route(z), varying)
    rule = RoutingRule(score, E, K)
    std = 0.5 + 0.1 * widened(z).square()
    noise = Noise(DRAWN[rows].to(std.dtype) * std, std)
    weights, experts = rule.route(z + noise.added)
    return RouterRecord(0, z, weights * KEPT[rows], experts, rule, noise, KEPT[rows])  # as a block uses them


@pytest.fixture
def z() -> torch.Tensor:
    return torch.randn(T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).requires_grad_()


@pytest.mark.parametrize("name", LOSSES)
def test_names_papers_and_help_texts(name: str) -> None:
    cls = load("loss", name)
    assert cls.name == name
    assert cls.title
    assert cls.paper.startswith("https://")
    assert cls.__doc__
    for key, field in cls.Parameters.model_fields.items():
        assert field.description, key
    cls(cls.Parameters())  # every parameter has a default


@pytest.mark.one_in(7)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", LOSSES)
def test_finite_and_differentiable(name: str, score: str, z: torch.Tensor) -> None:
    loss = made(name)

    def run(x: torch.Tensor) -> torch.Tensor:
        return loss([recorded(loss, x, score=score)])

    assert run(z).shape == ()
    assert run(z).isfinite()
    assert torch.autograd.gradcheck(run, (z,))
    gradient = torch.autograd.grad(run(z), z)[0]
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_masked_tokens_might_as_well_not_be_there(name: str, z: torch.Tensor) -> None:
    loss = made(name)
    mask = torch.arange(T).view(B, S) % 3 != 1
    whole, kept = recorded(loss, z), z.detach()[mask.flatten()].requires_grad_()
    part = recorded(loss, kept, mask.flatten())
    actual, expected = loss([whole], mask), loss([part])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    got, wanted = torch.autograd.grad(actual, z)[0], torch.autograd.grad(expected, kept)[0]
    torch.testing.assert_close(got[mask.flatten()], wanted, rtol=1e-10, atol=1e-14)
    assert not got[~mask.flatten()].any()


LOADS = [
    *((name, {}) for name in sorted(set(LOSSES) - {"hoyer"} - VARYING)),
    ("switch_balance", {"fraction": "first"}),
    ("switch_balance", {"fraction": "weights"}),
    ("importance_cv2", {"of": "probabilities"}),
]


@pytest.mark.parametrize(("name", "parameters"), LOADS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_loads_are_of_choices_before_dropping(
    name: str, parameters: dict[str, Any], score: str, z: torch.Tensor
) -> None:
    """A choice that found no room was chosen all the same: with and without a capacity a loss and its gradient are the same."""
    loss = made(name, **parameters)
    dropped, other = recorded(loss, z, score=score), recorded(loss, z, score=score)
    whole = RouterRecord(0, z, *other.rule.route(z + other.noise.added), other.rule, other.noise)
    assert not torch.equal(dropped.weights, whole.weights)
    actual, expected = loss([dropped]), loss([whole])
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    got, wanted = (torch.autograd.grad(value, z)[0] for value in (actual, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_two_unequal_ranks_compute_the_loss_of_the_whole(name: str, z: torch.Tensor) -> None:
    loss, mask = made(name), torch.arange(T).view(B, S) != 3
    expected = loss([recorded(loss, z)], mask)
    wanted = torch.autograd.grad(expected, z)[0]
    first = torch.arange(T) < S
    shares = [(z.detach()[rows].requires_grad_(), mask[rows.view(B, S)[:, 0]], rows) for rows in (first, ~first)]
    parts = [loss.sums(recorded(loss, part, rows), own).detach() for part, own, rows in shares]
    got = []
    for part, own, rows in shares:
        reduction = Reduction(lambda _: parts[0] + parts[1], ranks=2)
        value = auxiliary_losses([loss], {loss.reads: [recorded(loss, part, rows)]}, own, reduction)[name]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
        got.append(torch.autograd.grad(value, part)[0] / 2)  # ranks' gradients are averaged
    torch.testing.assert_close(torch.cat(got), wanted, rtol=1e-10, atol=1e-14)


MEANS: list[tuple[str, dict[str, Any]]] = [("router_z", {}), ("hoyer", {}), ("switch_balance", {"scope": "sequence"})]
MEANS.append(("choice_prediction", {}))
DIVIDED = [*((*each, "whole") for each in [*LOADS, *MEANS[1:]]), *((*each, "means") for each in MEANS)]


def test_which_losses_are_means() -> None:
    mask = torch.arange(T).view(B, S) < 2 * S - 1
    for name in LOSSES:
        count = made(name).mean_over(mask)
        assert (None if count is None else count.tolist()) == (None if (name, {}) not in MEANS else [2 * S - 1])
    assert made("switch_balance", scope="sequence").mean_over(mask).tolist() == [2]  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "parameters", "divided"), DIVIDED)
def test_unequal_passes_average_to_the_loss_of_the_whole(
    name: str, parameters: dict[str, Any], divided: str, z: torch.Tensor
) -> None:
    loss, mask = made(name, **parameters), torch.arange(T).view(B, S) != 3
    expected = loss([recorded(loss, z)], mask)
    wanted = torch.autograd.grad(expected, z)[0]
    first = torch.arange(T) < S
    shares = [(z.detach()[rows].requires_grad_(), mask[rows.view(B, S)[:, 0]], rows) for rows in (first, ~first)]
    known: Reduction = WholeBatch(
        torch.stack([loss.sums(recorded(loss, part, rows), own).detach() for part, own, rows in shares]).sum(0), 2
    )
    if divided == "means":
        counts = [loss.mean_over(own) for _, own, _ in shares]
        known = Means({name: sum(count for count in counts if count is not None)}, 2)  # type: ignore[dict-item]
    values, got = [], []
    for part, own, rows in shares:
        value = auxiliary_losses([loss], {loss.reads: [recorded(loss, part, rows)]}, own, known)[name]
        values.append(value)
        got.append(torch.autograd.grad(value, part)[0] / 2)  # passes' gradients are averaged
    torch.testing.assert_close(torch.stack(values).mean(), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat(got), wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", sorted(AT_BALANCE))
def test_perfect_balance_is_the_least(name: str) -> None:
    loss = made(name)
    certain = 60.0 * torch.eye(E, dtype=torch.float64)
    rule = RoutingRule("softmax", E, 1)

    def value(logits: torch.Tensor) -> float:
        return loss([RouterRecord(0, logits, *rule.route(logits), rule)]).item()

    assert value(certain) == pytest.approx(AT_BALANCE[name], abs=1e-12)
    crowded = certain[[0, 0, 0, 1, 2, 3]]
    assert value(crowded) > AT_BALANCE[name] + 1e-3


def test_every_loss_is_a_balance_or_none() -> None:
    assert set(AT_BALANCE) | NOT_BALANCES == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_all_tokens_masked_is_zero_or_finite(name: str, z: torch.Tensor) -> None:
    loss = made(name)
    value = loss([recorded(loss, z)], torch.zeros(B, S, dtype=torch.bool))
    assert value.isfinite()
    assert torch.autograd.grad(value, z)[0].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_summed_in_single(name: str, z: torch.Tensor) -> None:
    loss = made(name)
    low = z.detach().bfloat16()
    assert loss([recorded(loss, low)]).dtype == torch.float32


@pytest.mark.parametrize("name", LOSSES)
def test_state_survives_a_checkpoint(name: str, z: torch.Tensor) -> None:
    loss = made(name)
    loss([recorded(loss, z)])
    loss.after_step()
    again = made(name)
    again.load_state(loss.state())
    assert again.state() == loss.state()
