"""Jitter, noise, normalised logits and capacity on stock routers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from upcycle.errors import UsageError
from upcycle.models.own.routing.standardized import normalized_logits
from upcycle.registry import TARGETS
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.router_control import (
    NOISE_WEIGHT,
    RouterControl,
    _by_chance,
    _sampled,
)
from upcycle.trainers.routing.router_records import RouterRecord, capture
from upcycle.trainers.routing.stock_routers import moe_layers


def run(
    model: Any, ids: torch.Tensor, real: torch.Tensor | None = None, **keys: Any
) -> tuple[list[RouterRecord], torch.Tensor]:
    control = RouterControl(ControlParameters(**keys))
    control.rows(real)
    with capture(model, control) as recorder:
        logits = model(ids, use_cache=False).logits
        records = recorder.take()
    control.detach()
    return records, logits


@pytest.mark.parametrize("target", TARGETS)
def test_noise_changes_choices_in_training_alone(target: str, stock: Any, ids: torch.Tensor) -> None:
    model = stock(target)
    plain, before = run(model.eval(), ids)
    evaluated, after = run(model, ids, noise="fixed", jitter=0.1, capacity_factor=0.5, second="random")
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


def test_what_is_dropped_weighs_nothing_and_the_rest_as_before(stock: Any, ids: torch.Tensor) -> None:
    model = stock("mixtral")
    plain, _ = run(model.eval(), ids)
    dropped, _ = run(model.train(), ids, capacity_factor=0.5, min_capacity=1)
    record = dropped[0]
    assert record.kept is not None
    assert 0 < (~record.kept).sum() < record.kept.numel()
    assert torch.equal(record.weights, plain[0].weights * record.kept)
    assert torch.equal(record.chosen, plain[0].chosen)


def test_weights_before_dropping_are_those_of_the_same_router_without_a_capacity(stock: Any, ids: torch.Tensor) -> None:
    for target in TARGETS:
        model = stock(target)
        plain, _ = run(model.eval(), ids)
        dropped, _ = run(model.train(), ids, capacity_factor=0.5, min_capacity=1)
        assert dropped[0].dropped.any()
        torch.testing.assert_close(dropped[0].undropped, plain[0].weights.float(), rtol=1e-6, atol=1e-7)
        assert torch.equal(dropped[0].first, plain[0].first)


def test_what_a_token_keeps_is_renormalised_if_asked(stock: Any, ids: torch.Tensor) -> None:
    model = stock("qwen3_moe", experts=6, top_k=3).train()
    records, logits = run(model, ids, capacity_factor=0.5, min_capacity=1, renormalize=True)
    record = records[0]
    assert record.kept is not None
    for weights, kept, before in zip(record.weights, record.kept, record.undropped, strict=True):
        left = (before * kept).sum()
        expected = before * kept * (before.sum() / left if kept.any() else 0.0)
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-8)
    assert not record.kept.any(1).all()  # some token lost all its choices, and has a finite gradient all the same
    logits.sum().backward()
    assert all(
        weight.grad is not None and weight.grad.isfinite().all() for weight in moe_layers(model)[0].router.parameters()
    )


def test_padding_takes_no_room_and_is_not_dropped(stock: Any, ids: torch.Tensor) -> None:
    """A row with padding behind it is routed as the row alone."""
    model = stock("mixtral").train()
    alone, _ = run(model, ids[:, :7], torch.ones(2, 7, dtype=torch.bool), capacity_factor=0.6, min_capacity=1)
    real = torch.zeros(ids.shape, dtype=torch.bool)
    real[:, :7] = True
    padded, _ = run(model, ids, real, capacity_factor=0.6, min_capacity=1)
    for one, other in zip(alone, padded, strict=True):
        assert one.kept is not None
        assert other.kept is not None
        assert one.dropped.sum() > 0
        assert torch.equal(one.kept, other.kept[real.flatten()])
        assert not other.dropped[~real.flatten()].any()


def test_rows_share_room_only_if_the_pass_is_one_group(stock: Any, ids: torch.Tensor) -> None:
    model = stock("mixtral").train()
    real = torch.ones(ids.shape, dtype=torch.bool)
    apart = [run(model, row[None], real[:1], capacity_factor=0.7, min_capacity=1)[0][0].kept for row in ids]
    rows = run(model, ids, real, capacity_factor=0.7, min_capacity=1)[0][0].kept
    whole = run(model, ids, real, capacity_factor=0.7, min_capacity=1, capacity_group="pass")[0][0].kept
    assert rows is not None
    assert whole is not None
    assert torch.equal(rows, torch.cat([each for each in apart if each is not None]))
    assert torch.equal(whole, run(model, ids, capacity_factor=0.7, min_capacity=1)[0][0].kept)
    assert not torch.equal(rows, whole)


DRAWS = 6000
# Standard errors of a frequency are at most half the root of 1 / draws; five of them are exceeded once in 1.7 million.
FAR = 5 * 0.5 / DRAWS**0.5


def test_the_second_expert_is_dispatched_by_chance(record: Any) -> None:
    logits = torch.tensor([[2.0, 1.5, 0.0, -1.0], [3.0, 0.0, 1.0, 0.5]])
    weights = record(logits, 2).weights.repeat(DRAWS, 1)
    torch.manual_seed(3)
    asked = _by_chance(weights, torch.rand_like(weights)).view(DRAWS, 2, 2).double().mean(0)
    for row, rates in zip(logits.tolist(), asked.tolist(), strict=True):
        first, second = sorted((math.exp(z) for z in row), reverse=True)[:2]
        assert rates[0] == 1.0
        assert rates[1] == pytest.approx(min(1.0, 2 * second / (first + second)), abs=FAR)


def test_the_second_expert_is_drawn_in_proportion_to_its_score(record: Any) -> None:
    logits = torch.tensor([[2.0, 1.5, 0.0, -1.0]])
    made = record(logits.repeat(DRAWS, 1), 2)
    torch.manual_seed(4)
    drawn = torch.empty_like(made.scores).exponential_()
    weights, experts = _sampled(made.rule, made.scores, made.weights, made.experts, drawn)
    assert (experts[:, 0] == 0).all()
    chances = [0.0, *(math.exp(z) for z in (1.5, 0.0, -1.0))]
    rates = torch.bincount(experts[:, 1], minlength=4).double() / DRAWS
    assert rates.tolist() == pytest.approx([chance / sum(chances) for chance in chances], abs=FAR)
    chosen = made.scores.gather(1, experts)
    torch.testing.assert_close(weights, chosen / chosen.sum(1, keepdim=True))


def test_random_numbers_of_a_row_are_a_function_of_its_key(stock: Any, ids: torch.Tensor) -> None:
    """Whichever pass it falls to; no two rows, layers or uses draw the same."""
    model = stock("mixtral").train()
    control = RouterControl(ControlParameters(noise="fixed", noise_std=1.0, jitter=0.1))
    real = torch.ones(ids.shape, dtype=torch.bool)

    def noise(rows: list[int]) -> list[torch.Tensor]:
        control.rows(real[rows], [("step", row) for row in rows])
        model(ids[rows], use_cache=False)
        return [each.added for each in control.noise.values()]

    with capture(model, control):
        both, second = noise([0, 1]), noise([1])
    control.detach()
    length = ids.shape[1]
    for whole, alone in zip(both, second, strict=True):
        assert torch.equal(whole[length:], alone)
        assert not torch.equal(whole[:length], alone)
    assert not torch.equal(both[0], both[1])
    assert torch.cat(both).std().item() == pytest.approx(1.0, abs=5 / (2 * sum(map(torch.numel, both))) ** 0.5)


def test_choices_held_back_by_chance_ask_for_no_room_and_are_not_dropped(stock: Any, ids: torch.Tensor) -> None:
    torch.manual_seed(2)
    record = run(stock("mixtral").train(), ids, second="random", capacity_factor=0.5, min_capacity=1)[0][0]
    assert record.kept is not None
    assert record.skipped is not None
    assert record.skipped.any()
    assert not (record.skipped & record.kept).any()
    assert torch.equal(record.dropped, ~record.kept & ~record.skipped)
    assert torch.equal(record.weights != 0, record.kept)


@pytest.mark.parametrize(
    ("keys", "acts"),
    [
        ({"jitter": 0.3}, False),
        ({"noise": "fixed", "noise_std": 2.0}, False),
        ({"noise": "learned"}, False),
        ({"second": "random"}, False),
        ({"second": "sampled"}, False),
        ({"capacity_factor": 0.5, "min_capacity": 1}, False),
        ({"evaluation_capacity_factor": 0.5, "min_capacity": 1}, True),
        ({"normalize_logits": 2.0, "accept_unexported": True}, True),
    ],
)
def test_which_controls_act_in_evaluation(stock: Any, ids: torch.Tensor, keys: dict[str, Any], acts: bool) -> None:
    """Of a model in evaluation mode, which is what validation runs."""
    model = stock("mixtral").eval()
    _, before = run(model, ids)
    _, after = run(model, ids, **keys)
    assert torch.equal(before, after) != acts
    control = RouterControl(ControlParameters(**keys))
    with capture(model, control):
        assert ("exported model" in (control.unexported or "")) == ("normalize_logits" in keys)
    control.detach()
    if "normalize_logits" in keys:
        torch.testing.assert_close(after, run(model.train(), ids, **keys)[1])


@pytest.mark.parametrize("noise", ["none", "learned"])
def test_zero_rows_choose_every_expert_alike_where_there_is_noise(noise: Any, stock: Callable[..., Any]) -> None:
    """Shazeer et al. start so; without noise all tokens have the same two."""
    layer = moe_layers(stock("mixtral"))[0]
    rows: Any = layer.router.weight
    rows.data.zero_()
    RouterControl(ControlParameters(noise=noise)).attach(layer)
    torch.manual_seed(0)
    layer.router.train()
    _, _, experts = layer.router(torch.randn(4000, 32))
    shares = experts.flatten().bincount(minlength=4) / len(experts)
    if noise == "none":
        assert sorted(shares.tolist()) == [0.0, 0.0, 1.0, 1.0]
    else:  # each is chosen with chance 1/2: 4000 tokens have a standard error of 0.008
        assert (shares - 0.5).abs().max() < 0.04
