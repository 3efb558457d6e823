"""Jitter, noise, normalised logits and capacity on stock routers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from upcycle.errors import UsageError
from upcycle.registry import TARGETS
from upcycle.trainers.router_control import (
    NOISE_WEIGHT,
    ControlParameters,
    RouterControl,
    normalized_logits,
    within_capacity,
)
from upcycle.trainers.router_records import RouterRecord, capture
from upcycle.trainers.routing import RoutingRule, moe_layers


def run(model: Any, ids: torch.Tensor, **keys: Any) -> tuple[list[RouterRecord], torch.Tensor]:
    control = RouterControl(ControlParameters(**keys))
    with capture(model, control) as recorder:
        logits = model(ids, use_cache=False).logits
        records = recorder.take()
    control.detach()
    return records, logits


@pytest.mark.parametrize("target", TARGETS)
def test_noise_changes_choices_in_training_alone(target: str, stock: Any, ids: torch.Tensor) -> None:
    model = stock(target)
    plain, before = run(model.eval(), ids)
    evaluated, after = run(model, ids, noise="fixed", jitter=0.1, capacity_factor=1.0)
    assert torch.equal(before, after)
    assert all(torch.equal(a.experts, b.experts) and b.noise is None for a, b in zip(plain, evaluated, strict=True))
    torch.manual_seed(1)
    noisy, _ = run(model.train(), ids, noise="fixed", noise_std=2.0)
    first = noisy[0]
    assert first.noise is not None
    assert torch.equal(first.logits, plain[0].logits)
    assert not torch.equal(first.chosen, plain[0].chosen)
    weights, experts = first.rule.route(first.logits.float() + first.noise.added)
    assert torch.equal(experts, first.experts)
    torch.testing.assert_close(weights, first.weights)


def test_learned_noise(stock: Any, ids: torch.Tensor) -> None:
    model, seen = stock("mixtral").train(), {}
    router = moe_layers(model)[0].router
    router.register_forward_hook(lambda _, inputs, __: seen.update(x=inputs[0].detach().reshape(-1, 32)))
    records, _ = run(model, ids, noise="learned")
    noise = records[0].noise
    assert noise is not None
    # W is zero at first: log 2 and the floor.
    torch.testing.assert_close(noise.std, torch.full_like(noise.std, math.log(2) + 0.01))
    rows = router.get_parameter(NOISE_WEIGHT)
    with torch.no_grad():
        rows.normal_()
    records, _ = run(model, ids, noise="learned", noise_floor=0.0)  # attached again: W stays what it was
    noise = records[0].noise
    assert noise is not None
    torch.testing.assert_close(noise.std, (1 + linear(seen["x"], rows).exp()).log())
    records[0].weights.square().sum().backward()
    assert rows.grad is not None
    assert rows.grad.abs().max() > 0


def test_jitter_is_seen_by_the_router_alone(stock: Any, ids: torch.Tensor) -> None:
    """Copied experts and weights that sum to 1: whatever the router sees, the output is the same."""
    model = stock("mixtral").train()
    for layer in moe_layers(model):
        for weight in layer.block.experts.parameters():
            weight.data.copy_(weight.data[:1].expand_as(weight))
    plain, before = run(model, ids)
    jittered, after = run(model, ids, jitter=0.5)
    assert not torch.equal(plain[0].logits, jittered[0].logits)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


def test_checkpointing_draws_the_same_noise_again(stock: Any, ids: torch.Tensor) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = stock("mixtral").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        control = RouterControl(ControlParameters(noise="learned", jitter=0.1, capacity_factor=1.0, min_capacity=1))
        torch.manual_seed(5)
        with capture(model, control) as recorder:
            loss = model(ids, labels=ids, use_cache=False).loss
            loss = loss + sum(record.weights.square().mean() for record in recorder.take())
            loss.backward()
        gradients.append([weight.grad for weight in moe_layers(model)[0].router.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_normalised_logits() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64)
    for row, actual in zip(logits.tolist(), normalized_logits(logits, 2.0), strict=True):
        mean = sum(row) / 5
        std = (sum((z - mean) ** 2 for z in row) / 5) ** 0.5
        assert actual.tolist() == pytest.approx([2 * (z - mean) / (std + 1e-6) for z in row], rel=1e-12)


def test_normalised_logits_are_refused_where_the_export_would_differ(stock: Any, ids: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="normalises logits") as caught:
        run(stock("mixtral"), ids, normalize_logits=1.0)
    assert "accept_unexported" in str(caught.value.hint)
    plain, before = run(stock("mixtral", top_k=1), ids)  # one expert of weight 1: the same function
    model = stock("mixtral", top_k=1).train()
    normalised, after = run(model, ids, normalize_logits=1.0)
    torch.testing.assert_close(before, after)
    records, _ = run(stock("mixtral").train(), ids, normalize_logits=1.5, accept_unexported=True)
    torch.testing.assert_close(records[0].logits.std(-1, correction=0), torch.full((24,), 1.5), rtol=1e-4, atol=0)
    assert torch.equal(plain[0].experts, normalised[0].experts)


def naive_kept(weights: torch.Tensor, experts: torch.Tensor, capacity: int, by_weight: bool) -> list[list[bool]]:
    """Per expert, in order of tokens or of falling weight, as many as fit."""
    kept = [[False] * experts.shape[1] for _ in experts]
    for expert in range(int(experts.max()) + 1):
        asking = [(t, k) for t in range(len(experts)) for k in range(experts.shape[1]) if experts[t, k] == expert]
        if by_weight:
            asking.sort(key=lambda place: -weights[place].item())
        for t, k in asking[:capacity]:
            kept[t][k] = True
    return kept


@pytest.mark.parametrize("drop", ["position", "probability"])
@pytest.mark.parametrize(("factor", "least", "capacity"), [(1.0, 1, 10), (0.45, 1, 5), (0.1, 4, 4), (8.0, 1, 80)])
def test_capacity(drop: str, factor: float, least: int, capacity: int) -> None:
    rule = RoutingRule("softmax", 4, 2)
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(3)) + torch.tensor([2.0, 1.0, 0.0, 0.0])
    weights, experts = rule.route(logits)
    options = ControlParameters(capacity_factor=factor, drop=drop, min_capacity=least)  # type: ignore[arg-type]
    actual = within_capacity(weights, experts, rule, options)
    assert actual.tolist() == naive_kept(weights, experts, capacity, drop == "probability")


def test_what_is_dropped_weighs_nothing_and_the_rest_as_before(stock: Any, ids: torch.Tensor) -> None:
    model = stock("mixtral")
    plain, _ = run(model.eval(), ids)
    dropped, _ = run(model.train(), ids, capacity_factor=0.5, min_capacity=1)
    record = dropped[0]
    assert record.kept is not None
    assert 0 < (~record.kept).sum() < record.kept.numel()
    assert torch.equal(record.weights, plain[0].weights * record.kept)
    assert torch.equal(record.chosen, plain[0].chosen)
