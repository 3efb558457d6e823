"""Alarms on made-up runs: raised when they should be, once, and not otherwise."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from upcycle.trainers.recipe.part_recipes import AlarmParameters
from upcycle.trainers.run.alarms import Alarms, NanPolicy, expert_similarity, load_entropy


def counts(*numbers: int) -> dict[int, torch.Tensor]:
    return {2: torch.tensor(numbers)}


def test_dead_experts_once_per_death() -> None:
    alarms = Alarms(AlarmParameters(dead_steps=3))
    raised = []
    for step, number in enumerate([5, 0, 0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0]):
        found = alarms.loads(step, counts(9, 9, number, 9), top_k=2)
        raised += [(alarm.kind, alarm.step, alarm.layer) for alarm in found]
    assert raised == [("dead expert", 6, 2), ("dead expert", 12, 2)]


def test_every_dead_expert_is_named() -> None:
    alarms = Alarms(AlarmParameters(dead_steps=1))
    (alarm,) = alarms.loads(0, counts(9, 0, 0, 9, 9, 9, 9, 9), top_k=2)
    assert "expert 1, 2 in 1 steps" in alarm.message


def test_router_collapse_is_alarmed_once() -> None:
    alarms = Alarms(AlarmParameters(collapse_steps=2, dead_steps=1000))
    steps = [counts(8, 8, 8, 8), counts(16, 16, 1, 1), counts(16, 16, 0, 0), counts(16, 16, 0, 0), counts(16, 16, 0, 0)]
    kinds = [[alarm.kind for alarm in alarms.loads(step, load, top_k=2)] for step, load in enumerate(steps)]
    assert kinds == [[], [], [], ["router collapse"], []]


def test_experts_that_were_left_out_on_purpose_are_neither_dead_nor_a_collapse() -> None:
    gone = {2: torch.tensor([True, False, False, True])}
    alarms = Alarms(AlarmParameters(dead_steps=2, collapse_steps=2))
    assert [alarms.loads(step, counts(0, 9, 9, 0), 2, gone) for step in range(5)] == [[]] * 5
    # What they had been idle before counts on when they are back.
    alarms = Alarms(AlarmParameters(dead_steps=2, collapse_steps=99))
    assert [alarms.loads(step, counts(0, 9, 9, 9), 2, told) for step, told in enumerate([{}, gone, gone])] == [[]] * 3
    (alarm,) = alarms.loads(3, counts(0, 9, 9, 9), 2)
    assert "expert 0 in 2 steps" in alarm.message
    # Of those that are left, one has everything.
    alarms = Alarms(AlarmParameters(dead_steps=99, collapse_steps=1))
    (alarm,) = alarms.loads(0, counts(0, 9, 0, 0), 1, gone)
    assert alarm.kind == "router collapse"


@pytest.mark.parametrize(
    ("numbers", "top_k", "expected"), [((5, 5, 5, 5), 2, 1.0), ((9, 9, 0, 0), 2, 0.0), ((7, 0, 0, 0), 1, 0.0), ((3, 3), 2, 1.0)]
)  # fmt: skip
def test_load_entropy(numbers: tuple[int, ...], top_k: int, expected: float) -> None:
    assert load_entropy(torch.tensor(numbers), top_k) == pytest.approx(expected, abs=1e-12)


def test_load_entropy_formula() -> None:
    shares = [6 / 16, 5 / 16, 4 / 16, 1 / 16]
    entropy = -sum(p * math.log(p) for p in shares)
    expected = (entropy - math.log(2)) / (math.log(4) - math.log(2))
    assert load_entropy(torch.tensor([6, 5, 4, 1]), 2) == pytest.approx(expected, rel=1e-12)


def test_identical_experts_are_alarmed_after_the_given_step() -> None:
    alarms = Alarms(AlarmParameters(identical_after=100))
    assert alarms.similarities(99, {0: 1.0, 1: 0.5}) == []
    (alarm,) = alarms.similarities(100, {0: 1.0, 1: 0.5})
    assert (alarm.kind, alarm.layer) == ("identical experts", 0)
    assert "learning rate" in alarm.message
    assert alarms.similarities(101, {0: 1.0}) == []
    assert alarms.similarities(102, {0: 0.9}) == []
    assert len(alarms.similarities(103, {0: 1.0})) == 1


def test_expert_similarity() -> None:
    experts = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1)) + 0.7
    pairs = [
        cosine_similarity(experts[i].flatten().double(), experts[j].flatten().double(), dim=0).item()
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    assert expert_similarity(experts) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert expert_similarity(experts[:1].expand(4, 3, 4)) == pytest.approx(1, abs=1e-6)
    assert expert_similarity(experts[:1]) == 0


def test_loss_spikes() -> None:
    alarms = Alarms(AlarmParameters(spike_window=10))
    losses = [3.0 + 0.01 * (step % 3 - 1) for step in range(40)]
    assert all(alarms.loss(step, value) == [] for step, value in enumerate(losses))
    (alarm,) = alarms.loss(40, 5.0)
    assert alarm.kind == "loss spike"
    assert "loss 5 at step 40; the median of the last" in alarm.message
    assert alarms.loss(41, 5.0) == []  # the same spike
    assert alarms.loss(42, 3.0) == []
    assert len(alarms.loss(43, 5.0)) == 1


def test_a_falling_loss_is_no_spike() -> None:
    alarms = Alarms(AlarmParameters(spike_window=10))
    assert all(alarms.loss(step, 10 * 0.97**step) == [] for step in range(200))


def test_state_survives_a_checkpoint() -> None:
    alarms = Alarms(AlarmParameters(dead_steps=3, spike_window=5, collapse_steps=3))
    for step in range(2):
        alarms.loads(step, counts(9, 9, 0, 0), top_k=2)
    for step in range(5):
        alarms.loss(step, 2.0)
    alarms.similarities(2000, {2: 1.0})
    again = Alarms(alarms.parameters)
    again.load_state(json.loads(json.dumps(alarms.state())))
    assert {alarm.kind for alarm in again.loads(2, counts(9, 9, 0, 0), top_k=2)} == {"dead expert", "router collapse"}
    assert len(again.loss(6, 9.0)) == 1
    assert again.similarities(2001, {2: 1.0}) == []


def test_steps_that_are_not_finite_are_skipped_up_to_the_limit() -> None:
    policy = NanPolicy(most=2)
    values = [1.0, math.nan, math.inf, 2.0, math.nan, -math.inf, math.nan]
    assert [policy.decide(value, 1.0) for value in values] == ["go", "skip", "skip", "go", "skip", "skip", "stop"]
    assert NanPolicy(0).decide(1.0, math.nan) == "stop"
