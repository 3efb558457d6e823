"""Balancing by the bias: its update, its effect on a stock model, several ranks and micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.trainers.distributed.reduction import Reduction
from upcycle.trainers.recipe.part_recipes import BiasBalanceParameters
from upcycle.trainers.routing.bias_balance import BiasBalance, loads
from upcycle.trainers.routing.router_records import capture
from upcycle.trainers.routing.stock_routers import moe_layers, selection_bias

BIASED = ["glm4_moe", "dots1", "solar_open", "ernie4_5_moe", "lfm2_moe"]


def balance(model: Any, rate: float = 0.001) -> BiasBalance:
    return BiasBalance(model, BiasBalanceParameters(rate=rate))


def biases(model: Any) -> list[torch.Tensor]:
    return [selection_bias(layer.block, layer.router).detach().flatten() for layer in moe_layers(model)]  # type: ignore[union-attr]


@pytest.mark.parametrize("target", BIASED)
def test_the_bias_moves_by_the_sign_of_the_load(target: str, stock: Any, ids: torch.Tensor) -> None:
    model = stock(target)
    own, expected = balance(model), [bias.clone() for bias in biases(model)]
    mask = torch.ones_like(ids).bool()
    mask[0, :5] = False
    with capture(model) as recorder:
        for batch, counting in ((ids, None), (ids.flip(1), mask)):  # two micro-batches
            model(batch)
            records = recorder.take()
            own.observe(records, counting)
            if counting is None:
                counts = [[0] * 4 for _ in records]
            for layer, record in enumerate(records):
                for t, chosen in enumerate(record.experts.tolist()):
                    for expert in chosen:
                        counts[layer][expert] += int(counting is None or bool(mask.flatten()[t]))
    own.after_step()
    for actual, bias, count in zip(biases(model), expected, counts, strict=True):
        mean = sum(count) / 4
        moved = torch.tensor([0.001 * ((mean > c) - (mean < c)) for c in count])
        assert torch.equal(actual, bias + moved)
        assert moved.abs().sum() > 0
    before = [bias.clone() for bias in biases(model)]
    own.after_step()  # nothing was observed
    assert all(torch.equal(a, b) for a, b in zip(biases(model), before, strict=True))


@pytest.mark.long
def test_balancing_spreads_a_skewed_router(stock: Any) -> None:
    """A router that prefers two of its experts for every token uses all of them after enough steps; no weight changed."""
    model = stock("glm4_moe", experts=8, top_k=2)
    for bias in biases(model):
        bias[:2] += 1.0
    rng = torch.Generator().manual_seed(0)
    own, steps = balance(model, rate=0.02), []
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with capture(model) as recorder, torch.no_grad():
        for _ in range(120):
            model(torch.randint(4096, (4, 32), generator=rng))
            records = recorder.take()
            steps.append(torch.stack([record.chosen.sum(0) for record in records]))
            own.observe(records)
            own.after_step()
    assert [load.largest_over_mean for load in loads(dict(enumerate(steps[0])), {})] == [
        4.0,
        4.0,
    ]  # two of eight have all
    # 40 steps of 128 tokens: 1280 choices per expert, of which four standard errors are 11%.
    settled = torch.stack(steps[-40:]).sum(0)
    assert max(load.largest_over_mean for load in loads(dict(enumerate(settled)), {})) < 1.11
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_ranks_are_counted_together(stock: Any, ids: torch.Tensor) -> None:
    model, other = stock("dots1"), stock("dots1")
    whole = balance(model)
    with capture(model) as recorder:
        model(ids)
        whole.observe(recorder.take())
    whole.after_step()
    with capture(other) as recorder:
        shares = []
        for row in ids:
            other(row[None])
            shares.append(recorder.take())
    totals = torch.stack([sum(share[layer].chosen.sum(0) for share in shares) for layer in range(len(shares[0]))])  # type: ignore[misc]
    part = balance(other)
    part.observe(shares[0])
    part.after_step(Reduction(lambda _: totals, ranks=2))
    assert all(torch.equal(a, b) for a, b in zip(biases(model), biases(other), strict=True))


def test_small_steps_survive_bfloat16_and_checkpoints(stock: Any, ids: torch.Tensor) -> None:
    model = stock("glm4_moe")
    for layer in moe_layers(model):
        layer.router.e_score_correction_bias.fill_(1.0)
    own = balance(model.bfloat16())
    with capture(model) as recorder:
        for _ in range(8):  # 8 steps of 0.001 are a bfloat16's half spacing at 1, one is not
            model(ids)
            own.observe(recorder.take())
            own.after_step()
    state = own.state()
    assert {round(abs(b - 1), 3) for b in state["1"]} <= {round(i * 0.001, 3) for i in range(9)}
    assert max(abs(b - 1) for bias in state.values() for b in bias) == pytest.approx(0.008, rel=1e-4)
    again = stock("glm4_moe")
    other = balance(again)
    other.load_state(state)
    assert other.state() == state
    assert biases(again)[0].tolist() == state["1"]


def test_a_target_without_a_bias_is_refused(stock: Any) -> None:
    with pytest.raises(UsageError, match="MixtralTopKRouter has no bias") as caught:
        balance(stock("mixtral"))
    assert "switch_balance" in str(caught.value.hint)


def test_loads_report_the_largest_share_and_dead_experts() -> None:
    (first, second) = loads({3: torch.tensor([6, 0, 2, 0]), 5: torch.tensor([0, 0])}, {})
    assert (first.layer, first.largest_over_mean, first.dead) == (3, 3.0, 2)
    assert (second.largest_over_mean, second.dead) == (0.0, 2)


def test_experts_that_are_left_out_on_purpose_are_not_dead() -> None:
    (load,) = loads({3: torch.tensor([6, 0, 2, 0])}, {3: torch.tensor([False, True, False, False])})
    assert (load.largest_over_mean, load.dead) == (pytest.approx(6 / (8 / 3)), 1)
