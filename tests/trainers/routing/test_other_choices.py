"""BTX's soft routing and Sample-Top-1: the formulas in plain Python, what trains, and what the exported model then does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from training_runs import recipe_for, run, steps

from upcycle.errors import UsageError
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.other_choices import sampled_top_1, soft, temperature_of
from upcycle.trainers.routing.router_control import RouterControl
from upcycle.trainers.routing.router_records import RouterRecord, capture
from upcycle.trainers.routing.routing_rule import RoutingRule


def records(model: Any, ids: torch.Tensor, step: int = 0, **keys: Any) -> tuple[list[RouterRecord], torch.Tensor]:
    control = RouterControl(ControlParameters(**keys))
    control.step = step
    with capture(model, control) as recorder:
        logits = model(ids, use_cache=False).logits
        found = recorder.take()
    control.detach()
    return found, logits


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(value - max(row)) for value in row]
    return [value / sum(exps) for value in exps]


def test_the_formulas_in_fp64() -> None:
    logits = torch.randn(7, 5, dtype=torch.float64)
    weights, experts = soft(RoutingRule("softmax", 5, 2), logits)
    assert experts.tolist() == [list(range(5))] * 7
    for row, weight in zip(logits.tolist(), weights.tolist(), strict=True):
        assert weight == pytest.approx(softmax(row), rel=1e-12)
    drawn = torch.rand(7, 5, dtype=torch.float64) + 0.01
    weights, experts = sampled_top_1(logits, drawn, 0.7)
    for row, draw, weight, expert in zip(logits.tolist(), drawn.tolist(), weights, experts, strict=True):
        shares = softmax([(z - math.log(e)) / 0.7 for z, e in zip(row, draw, strict=True)])
        assert float(weight) == pytest.approx(max(shares), rel=1e-12)
        assert int(expert) == shares.index(max(shares))
    assert [temperature_of(step, 1e-4, 0.5) for step in (0, 1000, 10**6)] == pytest.approx([1.0, math.exp(-0.1), 0.5])


def test_experts_are_drawn_as_often_as_they_are_probable() -> None:
    """Four standard deviations of a frequency over n draws: ``4 sqrt(p (1 - p) / n)``."""
    row, count = [1.0, 0.2, -0.5], 20_000
    torch.manual_seed(0)
    drawn = torch.empty(count, 3, dtype=torch.float64).exponential_()
    _, experts = sampled_top_1(torch.tensor(row, dtype=torch.float64).expand(count, -1), drawn, 0.5)
    for expert, p in enumerate(softmax(row)):
        assert abs(float((experts == expert).double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / count)


def test_soft_routing_is_the_weighted_sum_of_all_experts(stock: Any, ids: torch.Tensor) -> None:
    model = stock("mixtral").train()
    found, logits = records(model, ids, choice="soft", accept_unexported=True)
    assert found[0].experts.shape == (24, 4)
    torch.testing.assert_close(found[0].gates, found[0].logits.softmax(-1))
    # A model whose top-k is all of its experts computes the same.
    whole = stock("mixtral", top_k=4).train()
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(whole(ids, use_cache=False).logits, logits, rtol=1e-4, atol=1e-4)
    _, same = records(whole, ids, choice="soft")
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-4)
    _, evaluated = records(model.eval(), ids, choice="soft", accept_unexported=True)
    torch.testing.assert_close(evaluated, logits, rtol=1e-4, atol=1e-4)


def test_sample_top_1_draws_in_training_and_takes_the_best_elsewhere(stock: Any, ids: torch.Tensor) -> None:
    model = stock("mixtral", top_k=1)
    plain = model.eval()(ids, use_cache=False).logits
    _, evaluated = records(model, ids, choice="sample")
    assert torch.equal(plain, evaluated)
    model.train()
    torch.manual_seed(2)
    hot, _ = records(model, ids, choice="sample")
    assert hot[0].experts.shape == (24, 1)
    assert bool((hot[0].weights < 1).any())
    assert not torch.equal(hot[0].experts, hot[0].logits.argmax(-1, keepdim=True))
    hot[0].weights.sum().backward()
    assert all(
        weight.grad is not None and bool(weight.grad.any()) for weight in model.model.layers[0].mlp.gate.parameters()
    )
    torch.manual_seed(2)
    cold, _ = records(model, ids, step=10**6, choice="sample")
    # The same draws, a lower temperature: the same experts, and more of the weight.
    assert torch.equal(cold[0].experts, hot[0].experts)
    assert bool((cold[0].weights >= hot[0].weights).all())
    mixed, _ = records(model, ids, choice="sample", soft_first=True, accept_unexported=True)
    assert [record.experts.shape[1] for record in mixed] == [4, *[1] * (len(mixed) - 1)]


@pytest.mark.parametrize(
    ("top_k", "keys", "said"),
    [
        (2, {"choice": "sample"}, "convert with --top-k 1"),
        (2, {"choice": "soft"}, "convert with --top-k 4"),
        (1, {"choice": "sample", "soft_first": True}, "accept_unexported"),
    ],
)
def test_what_could_not_be_exported_is_refused(
    top_k: int, keys: dict[str, Any], said: str, stock: Any, ids: torch.Tensor
) -> None:
    with pytest.raises(UsageError) as caught:
        records(stock("mixtral", top_k=top_k), ids, **keys)
    assert said in str(caught.value.hint)


@pytest.mark.parametrize(
    "other", [{"noise": "fixed"}, {"second": "random"}, {"capacity_factor": 1.0}, {"cluster_dropout": 0.5}]
)
def test_one_choice_at_a_time(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="leave one of them out"):
        ControlParameters(choice="sample", **other)
    for odd in ({"soft_first": True}, {"temperature_rate": 0.01}, {"least_temperature": 0.1, "choice": "soft"}):
        with pytest.raises(ValidationError, match=f"{next(iter(odd))} is of choice: sample"):
            ControlParameters(**odd)
    assert ControlParameters(**ControlParameters().model_dump()).choice == "top_k"  # with every key written out


@pytest.mark.long
@pytest.mark.parametrize("choice", ["soft", "sample"])
def test_a_run_is_the_same_however_it_is_divided(choice: str, moe_maker: Callable[..., Path], tmp_path: Path) -> None:
    """Draws belong to rows: passes of one or of two rows, and a run that is continued, see the same."""
    from pico_models import PICO_MOE

    name, changes = PICO_MOE["mixtral"]
    source = moe_maker(tmp_path / "moe", name, {**changes, "num_experts_per_tok": 4 if choice == "soft" else 1})
    stage = {"control": {"choice": choice}, "losses": {"switch_balance": {"fraction": "weights"}}}
    whole = recipe_for(source, tmp_path / "whole", stage=stage)
    run(whole)
    single = recipe_for(source, tmp_path / "single", stage=stage, micro_batch=1)
    run(single)
    for one, other in zip(steps(whole), steps(single), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["loss/switch_balance"] == pytest.approx(other["loss/switch_balance"], rel=1e-4)
