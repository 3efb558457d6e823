"""Estimates of traffic against restatements by hand; tests/trainers/forecast/test_forecasts_on_ranks.py counts real bytes."""

from __future__ import annotations

from typing import Any

import pytest

from upcycle.hardware.accelerators import DEVICES
from upcycle.trainers.forecast.communication import Traffic, forecast_communication
from upcycle.trainers.forecast.flops import TrainingFlops
from upcycle.trainers.forecast.model_counts import LayerCounts, ModelCounts, Weight
from upcycle.trainers.forecast.ranks_planned import World
from upcycle.trainers.forecast.zero_division import Division
from upcycle.trainers.recipe.training_recipe import parse_train_recipe

D, F, E, K = 600, 700, 8, 2
LARGE, SMALL, EXPERTS = 2_000_000, 500, 3 * E * F * D
WEIGHTS = (
    Weight("embed", LARGE, "rest", True, "embed"),
    Weight("norm", SMALL, "rest", True, "norm"),
    Weight("experts", EXPERTS, "experts", True, "mlp."),
)
MODEL = ModelCounts("mixtral", D, 100, WEIGHTS, (LayerCounts(D, D, 0, E, K, F),), TrainingFlops(1, 1, 1), "grouped_mm")


def division(stage: int, world: int = 16, parallel: int = 1, **keys: Any) -> Division:
    told = {"model": "m", "output": "o", "data": "demo", "stages": {"steps": 1, "learning_rate": 1}, "length": 128}
    return Division(
        parse_train_recipe({**told, "global_batch": 64, "micro_batch": 2, **keys}, "r"), MODEL, world, stage, parallel
    )


def payloads(own: Division) -> list[tuple[str, float, int]]:
    return [(each.kind, each.payload, each.ranks) for each in forecast_communication(own).traffic]


def test_messages_of_experts_that_every_rank_holds() -> None:
    rest, passes = LARGE + SMALL, 2
    assert payloads(division(0)) == [("all_reduce", 4 * rest, 16), ("all_reduce", 4 * EXPERTS, 16)]
    assert payloads(division(1)) == [
        ("all_reduce", 4 * rest, 16),
        ("all_gather", 4 * rest, 16),
        ("all_reduce", 4 * EXPERTS, 16),
        ("all_gather", 4 * EXPERTS, 16),
    ]
    assert payloads(division(2, dtype="bfloat16"))[:2] == [
        ("all_reduce", passes * 2 * rest, 16),
        ("all_gather", 2 * rest, 16),
    ]
    # Everything is used again within 1e9 elements, so it is gathered once a pass; the norm, which is small, once a step.
    assert payloads(division(3)) == [
        ("all_gather", 4 * (SMALL + passes * LARGE), 16),
        ("reduce_scatter", 4 * passes * rest, 16),
        ("all_gather", 4 * passes * EXPERTS, 16),
        ("reduce_scatter", 4 * passes * EXPERTS, 16),
    ]


def test_weights_that_are_released_are_gathered_again() -> None:
    short = {"settings": {"max_reuse_distance": 2 * EXPERTS}}
    # Nothing is behind the experts; behind the embedding are more than the distance allows.
    assert payloads(division(3, zero=short))[0][1] == 4 * (SMALL + 2 * 2 * LARGE)
    assert payloads(division(3, zero=short))[2][1] == 4 * 2 * EXPERTS
    again = division(3, zero=short, activation_checkpointing=True)
    assert payloads(again)[0][1] == 4 * (SMALL + 2 * 3 * LARGE)


def test_messages_of_experts_divided_among_ranks() -> None:
    tokens, passes = 2 * 128, 2
    found = payloads(division(1, parallel=4))
    assert found[2:] == [
        ("all_reduce", 4 * EXPERTS / 4, 4),
        ("all_gather", 4 * EXPERTS / 4, 4),
        ("all_to_all", passes * 4 * 4 * K * tokens * D, 4),
    ]
    assert payloads(division(1, parallel=4, activation_checkpointing=True))[-1][1] == found[-1][1] * 1.5
    # Where every rank has experts of its own, nobody shares their gradients.
    assert [each[0] for each in payloads(division(1, 8, 8))] == ["all_reduce", "all_gather", "all_to_all"]


def test_one_rank_sends_nothing() -> None:
    for stage in range(4):
        assert forecast_communication(division(stage, 1)).total == 0


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_sent_bytes_equal_a_ring_step_by_step(ranks: int) -> None:
    """A ring passes ``1 / n`` of the tensor on ``n - 1`` times to scatter sums, and as often to gather them."""
    scattered = sum(120 / ranks for _ in range(ranks - 1))
    assert Traffic("reduce_scatter", 120, ranks).sent == pytest.approx(scattered)
    assert Traffic("all_gather", 120, ranks).sent == pytest.approx(scattered)
    assert Traffic("all_reduce", 120, ranks).sent == pytest.approx(2 * scattered)
    others = sum(120 / ranks for other in range(ranks) if other)
    assert Traffic("all_to_all", 120, ranks).sent == pytest.approx(others)


def test_seconds_within_a_machine_and_between() -> None:
    a100 = DEVICES["A100"]
    one, four = World(a100, 1, 8), World(a100, 4, 8)
    assert Traffic("all_reduce", 8e9, 8).seconds(one) == pytest.approx(2 * 8e9 * 7 / 8 / 300e9)
    # Between machines each of eight devices sends an eighth of the tensor, three quarters of it and twice.
    assert Traffic("all_reduce", 8e9, 32).seconds(four) == pytest.approx(2 * 1e9 * 3 / 4 / 25e9)
    # Members that are eight apart are alone on their machines.
    assert Traffic("all_gather", 8e9, 4, 8).seconds(four) == pytest.approx(8e9 * 3 / 4 / 25e9)
    assert Traffic("all_to_all", 8e9, 8).seconds(four) == pytest.approx(8e9 * 7 / 8 / 300e9)
    assert Traffic("all_to_all", 8e9, 16).seconds(four) == pytest.approx(8e9 / 2 / 25e9)


def test_the_total_is_the_sum_over_kinds_of_messages() -> None:
    told = forecast_communication(division(2, parallel=4)).as_dict()
    assert told["total"] == pytest.approx(sum(size for kind, size in told.items() if kind != "total"))
