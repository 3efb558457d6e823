"""DeepSpeed's configuration, made from a training recipe and the model."""

from __future__ import annotations

from typing import Any

import torch

from upcycle.errors import UsageError
from upcycle.registry import suggestion
from upcycle.trainers.distributed import expert_parallel
from upcycle.trainers.recipe.training_recipe import TrainRecipe, ZeroRecipe, accumulation
from upcycle.trainers.routing.stock_routers import moe_layers

# Keys of zero_optimization that other keys of the recipe decide.
_OWN_KEYS = ("stage", "offload_optimizer", "offload_param", "leaf_module")


def deepspeed_config(recipe: TrainRecipe, model: Any, world_size: int) -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize``.

    Args:
        recipe: the run's.
        model: the stock model, not yet wrapped.
        world_size: number of ranks.

    Raises:
        UsageError: the batch or the experts cannot be divided among the ranks, or a key of ``zero.settings`` is unknown.
    """
    stage = recipe.zero_stage(world_size)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.micro_batch,
        "gradient_accumulation_steps": accumulation(recipe, world_size),
        "gradient_clipping": recipe.clip if stage else 0.0,  # without ZeRO, Stepper clips
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(recipe.zero, stage, model),
    }
    if recipe.dtype == "bfloat16" and stage:  # without ZeRO, the optimizer's weights are fp32 (master_weights.py)
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if recipe.expert_parallel > 1:
        model_type = model.config.model_type
        experts = max((layer.rule.experts for layer in moe_layers(model)), default=0)
        expert_parallel.check(model_type, experts, recipe.expert_parallel, world_size)
        config["expert_parallel"] = expert_parallel.configuration(model_type, recipe.expert_parallel)
    return config


def leaf_classes(model: Any) -> list[str]:
    """Names of the MoE blocks' classes, whose weights ZeRO-3 must fetch as a whole, because ranks use different experts."""
    kinds = {type(layer.block) for layer in moe_layers(model)}
    return sorted(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)


def _zero(zero: ZeroRecipe, stage: int, model: Any) -> dict[str, Any]:
    _check_settings(zero, stage)
    section: dict[str, Any] = {"stage": stage, **zero.settings}
    if zero.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if zero.offload_weights:
        section["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if stage == 3 and (classes := leaf_classes(model)):
        section["leaf_module"] = {"classes": classes, "names": [], "name_suffixes": []}
    return section


def _check_settings(zero: ZeroRecipe, stage: int) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    taken = [key for key in zero.settings if key in _OWN_KEYS]
    if taken:
        raise UsageError(
            f"zero.settings.{taken[0]}: other keys of the recipe decide this",
            hint="use zero's own keys",
        )
    known = {name for key, field in DeepSpeedZeroConfig.model_fields.items() for name in (key, field.alias) if name}
    unknown = [key for key in zero.settings if key not in known]
    if unknown:
        raise UsageError(f"zero.settings: unknown key '{unknown[0]}'", hint=suggestion(unknown[0], known))
    try:
        DeepSpeedZeroConfig(stage=stage, **zero.settings)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise UsageError(f"zero.settings.{key}: {fault['msg']}", hint="see DeepSpeed's zero_optimization") from None
