"""Bounds on tokens per second against restatements by hand."""

from __future__ import annotations

from typing import Any

import pytest

from upcycle.hardware.accelerators import DEVICES
from upcycle.kernels.gpu.compile_gate.roofline import Shape, kernels
from upcycle.trainers.forecast.communication import forecast_communication
from upcycle.trainers.forecast.flops import TrainingFlops
from upcycle.trainers.forecast.memory import expert_bytes, layer_bytes
from upcycle.trainers.forecast.model_counts import LayerCounts, ModelCounts, Weight
from upcycle.trainers.forecast.ranks_planned import World
from upcycle.trainers.forecast.speed import SpeedForecast, experts_moved, flops_per_token, forecast_speed, moved_bytes
from upcycle.trainers.forecast.zero_division import Division
from upcycle.trainers.recipe.training_recipe import parse_train_recipe

D, F, E, K, V = 600, 700, 8, 2, 5000
WEIGHTS = (Weight("embed", V * D, "rest", True, "embed"), Weight("e", 3 * E * F * D, "experts", True, "mlp."))
WORLD = World(DEVICES["H100"], 2, 8)


def model(implementation: str = "grouped_mm") -> ModelCounts:
    layer = LayerCounts(D, D, 0, E, K, F)
    return ModelCounts("mixtral", D, V, WEIGHTS, (layer,), TrainingFlops(10, 11, 12), implementation)


def division(stage: int = 1, implementation: str = "grouped_mm", **keys: Any) -> Division:
    told = {"model": "m", "output": "o", "data": "demo", "stages": {"steps": 1, "learning_rate": 1}, "length": 128}
    recipe = parse_train_recipe({**told, "global_batch": 64, "micro_batch": 2, "dtype": "bfloat16", **keys}, "r")
    return Division(recipe, model(implementation), 16, stage)


def test_the_time_of_computing_is_flops_over_the_peak() -> None:
    own = division()
    assert flops_per_token(own, None) == 33
    assert flops_per_token(division(activation_checkpointing=True), None) == 43
    assert flops_per_token(own, model()) == 43
    speed = forecast_speed(own, WORLD, forecast_communication(own), None)
    assert speed.compute == pytest.approx(16 * 989e12 / 33)


def test_our_kernels_traffic_is_that_of_the_rooflines_table() -> None:
    """The roofline adds up every launch; the forecast's formula is the table's sum without weights and sums per token."""
    own = division(implementation="upcycle")
    tokens = 256
    shape = Shape("s", tokens, D, F, E, K)
    weights = 2 * 9 * E * D * F  # bytes: three matrices read forward, read backward, and their gradients written
    launches = sum(cost.bytes for cost in kernels(shape).values()) - weights
    assert experts_moved(own, own.counts.layers[0]) == pytest.approx(launches)


def test_memory_moves_weights_states_and_activations() -> None:
    own = division()
    elements, tokens, passes = sum(each.elements for each in WEIGHTS), 256, 2
    layer = own.counts.layers[0]
    kept = 2 * (layer_bytes(own, layer) - expert_bytes(own, layer)) + experts_moved(own, layer)
    every_pass = 3 * 2 * elements + kept + 16 * tokens * V
    states = (2 * 12 + 4 + 2) * elements / 16
    assert moved_bytes(own) == pytest.approx(passes * every_pass + states)
    speed = forecast_speed(own, WORLD, forecast_communication(own), None)
    assert speed.memory == pytest.approx(64 * 128 / (moved_bytes(own) / 3.35e12))


def test_the_lowest_bound_is_the_limit() -> None:
    assert SpeedForecast(3.0, 2.0, 1.0).as_dict() == {
        "compute": 3.0,
        "memory": 2.0,
        "network": 1.0,
        "bound": 1.0,
        "unoverlapped": pytest.approx(1 / (1 / 2 + 1 / 1)),
        "limit": "network",
    }
    assert SpeedForecast(3.0, 4.0, None).limit == "compute"
    assert SpeedForecast(3.0, 4.0, None).unoverlapped == pytest.approx(3.0)


def test_a_slower_network_slows_down() -> None:
    own = division(2)
    sent = forecast_communication(own)
    apart = World(DEVICES["H100"], 16, 1)
    wide = forecast_speed(own, apart, sent, None).network
    alone = forecast_speed(own, World(DEVICES["H100"], 1, 16), sent, None).network
    assert wide
    assert alone
    assert wide < alone
    assert sent.seconds(apart) == pytest.approx(64 * 128 / wide)
