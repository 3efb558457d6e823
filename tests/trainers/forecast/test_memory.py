"""Estimates of memory against restatements by hand, and against what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from upcycle.models.experts import use_eager_experts
from upcycle.trainers.forecast.flops import TrainingFlops
from upcycle.trainers.forecast.memory import (
    activation_bytes,
    arriving_bytes,
    bucket_bytes,
    expert_bytes,
    forecast_memory,
    gathered_bytes,
    gradient_bytes,
    layer_bytes,
    optimizer_bytes,
    weight_bytes,
)
from upcycle.trainers.forecast.model_counts import LayerCounts, ModelCounts, Weight, count_model
from upcycle.trainers.forecast.zero_division import Division
from upcycle.trainers.recipe.training_recipe import parse_train_recipe

D, V, F = 1000, 50_000, 400


def counts(layers: int = 3, experts: int = 8, **changes: Any) -> ModelCounts:
    """A made-up model: embeddings, per layer attention, a norm, a router and experts."""
    weights = [Weight("embed", V * D, "rest", True, "embed")]
    for index in range(layers):
        place = f"layers.{index}"
        weights += [
            Weight(f"{place}.attention", 4 * D * D, "rest", True, f"{place}.attention", index),
            Weight(f"{place}.norm", D, "rest", True, place, index),
            Weight(f"{place}.router", experts * D, "router", True, f"{place}.mlp.", index),
            Weight(f"{place}.experts", 3 * experts * F * D, "experts", True, f"{place}.mlp.", index),
        ]
    layer = LayerCounts(D, D // 4, 0, experts, 2, F)
    made = ModelCounts("mixtral", D, V, tuple(weights), (layer,) * layers, TrainingFlops(1, 1, 1), "grouped_mm")
    return replace(made, **changes)


def division(stage: int, world: int = 16, parallel: int = 1, model: ModelCounts | None = None, **keys: Any) -> Division:
    told = {"model": "m", "output": "o", "data": "demo", "stages": {"steps": 1, "learning_rate": 1}, "length": 128}
    recipe = parse_train_recipe({**told, "global_batch": 64, "micro_batch": 2, **keys}, "r")
    return Division(recipe, model or counts(), world, stage, parallel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parallel", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_states_weight_by_weight(stage: int, parallel: int, dtype: str) -> None:
    """Every element of rank 0: is it here as a weight, as a gradient, with states?"""
    own = division(stage, 16, parallel, dtype=dtype)
    item = 4 if dtype == "float32" else 2
    weights = gradients = states = 0.0
    for weight in own.counts.weights:
        here = weight.elements / parallel if weight.part == "experts" else weight.elements
        sharers = 16 / parallel if weight.part == "experts" else 16
        part = here / sharers
        small = here <= 100_000
        weights += item * (part + (here if small and sharers > 1 else 0) if stage == 3 else here)
        # At stage 0, a 16-bit gradient becomes its fp32 weight's at once, which is kept beside; ZeRO keeps both.
        gradients += 4 * part if stage >= 2 else here * (4 if stage == 0 or item == 4 else 2 + 4)
        states += (8 if item == 4 else 12) * here if stage == 0 else 12 * part
    assert weight_bytes(own) == pytest.approx(weights)
    assert gradient_bytes(own) == pytest.approx(gradients)
    assert optimizer_bytes(own) == pytest.approx(states)


def test_frozen_weights_have_no_states() -> None:
    frozen = counts(weights=tuple(replace(each, trained=each.part == "router") for each in counts().weights))
    for stage in range(4):
        own = division(stage, 4, model=frozen)
        trained = 3 * 8 * D
        assert gradient_bytes(own) == (4 * trained if stage < 2 else trained)
        assert optimizer_bytes(own) == (8 * trained if stage == 0 else 3 * trained)
        assert weight_bytes(own) == pytest.approx(weight_bytes(division(stage, 4)))


def test_other_optimizers_keep_less() -> None:
    elements = counts().elements
    for optimizer, kept in (({"name": "sgd"}, 1), ({"name": "sgd", "momentum": 0}, 0), ({"name": "adamw"}, 2)):
        assert optimizer_bytes(division(1, 16, optimizer=optimizer)) == pytest.approx(4 * (kept + 1) * elements / 16)


def test_buckets_and_gathered_weights() -> None:
    trained = counts().elements
    assert [bucket_bytes(division(stage)) for stage in range(4)] == [
        4 * trained,
        4 * 500_000_000,
        4 * (500_000_000 + trained),
        4 * (500_000_000 + trained),
    ]
    small = {"settings": {"reduce_bucket_size": 1000}}
    assert bucket_bytes(division(2, dtype="bfloat16", zero=small)) == 2 * 2000
    assert bucket_bytes(division(1, dtype="bfloat16", zero=small)) == 4 * 1000
    assert gathered_bytes(division(2)) == arriving_bytes(division(2)) == 0
    whole = trained - 3 * (D + 8 * D)  # norms and routers are small, and always there
    assert gathered_bytes(division(3)) == 4 * whole
    few = {"settings": {"stage3_max_live_parameters": 1_000_000}}
    assert gathered_bytes(division(3, zero=few)) == 4 * V * D  # the largest is fetched as a whole
    assert arriving_bytes(division(3, zero=few)) == 4 * V * D


def test_offloading_moves_states_to_the_host() -> None:
    here = forecast_memory(division(2), None)
    moved = forecast_memory(division(2, zero={"offload_optimizer": True}), None)
    assert moved.host == here.optimizer + here.gradients
    assert moved.total == pytest.approx(here.total - moved.host)
    everything = {"stage": 3, "offload_optimizer": True, "offload_weights": True}
    assert forecast_memory(division(3, zero=everything), None).weights == 4 * 3 * (D + 8 * D)


def test_experts_by_implementation() -> None:
    """b bytes per element: the formulas, of T = 256 tokens. That x is the norm's output is measured below."""
    rows = 512
    layer = counts().layers[0]
    for name, wanted in (
        ("eager", 4 * (3 * rows * D + 4 * rows * F)),
        ("grouped_mm", 4 * (2 * rows * D + 4 * rows * F)),
        ("upcycle", 4 * 2 * rows * F),
        ("upcycle_lean", 0),
    ):
        assert expert_bytes(division(1, model=counts(implementation=name)), layer) == wanted
    assert expert_bytes(division(1, parallel=4), layer) == 4 * (4 * rows * D + 4 * rows * F)


def test_activation_checkpointing_keeps_inputs_and_one_layer() -> None:
    plain, again = division(1), division(1, activation_checkpointing=True)
    layer = layer_bytes(plain, plain.counts.layers[0])
    head = 256 * V * (4 + 4)
    assert activation_bytes(plain) == pytest.approx(3 * layer + head)
    assert activation_bytes(again) == pytest.approx(3 * 4 * 256 * D + layer + head)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_parent_is_whole_on_every_rank_and_in_stage_3_divided(stage: int) -> None:
    own = division(stage, stages={"steps": 1, "learning_rate": 1, "distillation": {"dtype": "bfloat16"}})
    parent = counts(experts=1)
    with_it, without = forecast_memory(own, parent), forecast_memory(own, None)
    # A sixteenth of all, and the embeddings while they are gathered, which have more elements than a layer.
    divided = parent.elements / 16 + V * D
    assert with_it.parent == 2 * (divided if stage == 3 else parent.elements)
    assert with_it.activations - without.activations == 256 * V * (2 + 4)
    told = {"dtype": "bfloat16", "cache": "kept"}
    cached = division(stage, stages={"steps": 1, "learning_rate": 1, "distillation": told})
    assert forecast_memory(cached, parent).activations - without.activations == 256 * V * 16
    teacher = 2 * parent.elements
    assert with_it.loading == (max(4 * V * D, 2 * V * D) if stage == 3 else 4 * own.counts.elements + teacher)


def test_a_layer_is_as_large_as_its_weights_together() -> None:
    assert counts(layers=1, experts=80).largest_part == 4 * D * D + D + 80 * D + 3 * 80 * F * D


def saved(model: Any, ids: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, weights and constants left out."""
    constant = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False).logits.sum()
    return sum(each.untyped_storage().nbytes() for key, each in kept.items() if key not in constant)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "upcycle", "upcycle_lean"])
@pytest.mark.parametrize("target", ["mixtral", "qwen3_moe"])
def test_a_layer_keeps_what_was_forecast(stock: Callable[..., Any], target: str, implementation: str) -> None:
    """One MoE layer more keeps so many bytes more: within 5%, as small things (indices, a number per head) are left out."""
    ids = torch.randint(4096, (2, 128), generator=torch.Generator().manual_seed(0))
    found = []
    for layers in (1, 3):
        model = stock(target, num_hidden_layers=layers).train()
        if implementation != "eager":
            model.set_experts_implementation(implementation)
        else:
            use_eager_experts(model)
        found.append(saved(model, ids))
    own = division(1, model=count_model(model.config.to_dict(), target, 128, experts=implementation))
    assert own.tokens == ids.numel()
    assert layer_bytes(own, own.counts.layers[-1]) == pytest.approx((found[1] - found[0]) / 2, rel=0.05)
    assert own.counts.layers[-1].experts == 4, "not the dense layer that some targets begin with"
