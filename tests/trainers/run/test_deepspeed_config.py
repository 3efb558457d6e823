"""The configuration that a recipe gives DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from upcycle.errors import UsageError
from upcycle.trainers.recipe.training_recipe import TrainRecipe, accumulation, parse_train_recipe
from upcycle.trainers.run.deepspeed_config import deepspeed_config


def recipe(**changes: Any) -> TrainRecipe:
    base = {"model": "m", "output": "o", "data": "demo", "stages": {"steps": 1, "learning_rate": 1}}
    return parse_train_recipe({**base, "global_batch": 8, "micro_batch": 2, **changes}, "r")


def test_batches_divide_among_ranks(stock: Callable[..., Any]) -> None:
    assert [accumulation(recipe(), world) for world in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(UsageError, match="global_batch 8 is not a multiple of micro_batch 2 x 3 ranks") as error:
        accumulation(recipe(), 3)
    assert error.value.hint == "set global_batch to a multiple of 6, or a smaller micro_batch"
    config = deepspeed_config(recipe(), stock("mixtral"), 2)
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == 2


def test_moe_blocks_are_leaves_under_zero_3(stock: Callable[..., Any]) -> None:
    for target in ("mixtral", "granitemoe", "glm4_moe"):
        model = stock(target)
        zero = deepspeed_config(recipe(zero={"stage": 3}), model, 1)["zero_optimization"]
        (named,) = zero["leaf_module"]["classes"]
        module, _, name = named.rpartition(".")
        assert any(type(part).__module__ == module and type(part).__name__ == name for part in model.modules())
    assert "leaf_module" not in deepspeed_config(recipe(), stock("mixtral"), 1)["zero_optimization"]


def test_settings_reach_zero_and_bfloat16_keeps_fp32_sums(stock: Callable[..., Any]) -> None:
    settings = {"reduce_bucket_size": 1000}
    zero = {"stage": 3, "offload_optimizer": True, "offload_weights": True, "settings": settings}
    told = recipe(dtype="bfloat16", zero=zero)
    config = deepspeed_config(told, stock("mixtral"), 1)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert config["bf16"]["enabled"]
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


def test_without_zero_no_rank_sums_gradients_in_bfloat16(stock: Callable[..., Any]) -> None:
    alone = recipe(dtype="bfloat16", zero={"stage": 0})
    assert "bf16" not in deepspeed_config(alone, stock("mixtral"), 1)  # fp32 weights are the optimizer's
    with pytest.raises(UsageError, match=r"zero.stage 0 would add up gradients of 2 ranks in bfloat16") as error:
        deepspeed_config(alone, stock("mixtral"), 2)
    assert error.value.hint == "set zero.stage to 1, 2 or 3, or leave it out"


def test_experts_are_divided_by_the_preset_of_the_target(stock: Callable[..., Any]) -> None:
    config = deepspeed_config(recipe(expert_parallel=2), stock("qwen2_moe"), 4)
    assert config["expert_parallel"]["autoep_size"] == 2
    assert config["expert_parallel"]["preset_model"] == "qwen3_moe"
    with pytest.raises(UsageError, match="biases on the choice of experts"):
        deepspeed_config(recipe(expert_parallel=2), stock("glm4_moe"), 2)


def test_one_rank_divides_nothing_unless_it_must() -> None:
    assert [recipe().zero_stage(world) for world in (1, 2)] == [0, 1]
    assert recipe(dtype="bfloat16").zero_stage(1) == 0
    assert recipe(dtype="bfloat16").zero_stage(2) == 1
    assert recipe(zero={"offload_optimizer": True}).zero_stage(1) == 1
    assert [recipe(zero={"stage": 2}).zero_stage(world) for world in (1, 2)] == [2, 2]


def test_a_dense_model_has_no_experts(pico: Callable[[str], Path]) -> None:
    from upcycle.architectures.stock import load_stock_model

    model = load_stock_model(pico("llama"))
    assert "leaf_module" not in deepspeed_config(recipe(zero={"stage": 3}), model, 1)["zero_optimization"]
    with pytest.raises(UsageError, match="no preset for this architecture"):
        deepspeed_config(recipe(expert_parallel=2), model, 2)
