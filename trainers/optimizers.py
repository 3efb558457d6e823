"""The optimizer of a recipe, and its states under the names of the model's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from upcycle.errors import EnvironmentFault
from upcycle.trainers.recipe import OptimizerRecipe

PEAK = "peak_lr"  # key of a parameter group: what a schedule multiplies


def make_optimizer(recipe: OptimizerRecipe, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over parameter groups with ``lr`` and ``weight_decay``; each remembers its peak learning rate.

    Raises:
        EnvironmentFault: DeepSpeed's cannot be built here.
    """
    given = [{**group, PEAK: group["lr"]} for group in groups]
    if recipe.name == "sgd":
        return torch.optim.SGD(given, momentum=recipe.momentum)
    settings: dict[str, Any] = {"betas": recipe.betas, "eps": recipe.epsilon}
    if recipe.name == "cpu_adamw":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            return DeepSpeedCPUAdam(given, adamw_mode=True, **settings)
        except Exception as error:  # compilers fail in many ways
            raise EnvironmentFault(
                f"DeepSpeed's cpu_adamw cannot be built here: {error}", hint="optimizer.name: adamw"
            ) from None
    return torch.optim.AdamW(given, fused=torch.cuda.is_available(), **settings)


def state_keys(recipe: OptimizerRecipe) -> tuple[str, ...]:
    """Names of the tensors the optimizer keeps for every parameter."""
    if recipe.name == "sgd":
        return ("momentum_buffer",) if recipe.momentum else ()
    return ("exp_avg", "exp_avg_sq")


def set_rates(optimizer: Any, factor: float) -> float:
    """Give every group its peak learning rate times ``factor``; returns the largest."""
    for group in optimizer.param_groups:
        group["lr"] = group[PEAK] * factor
    return max(float(group["lr"]) for group in optimizer.param_groups)
