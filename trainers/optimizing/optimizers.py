"""The optimizer of a recipe, and its states under the names of the model's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from upcycle.errors import EnvironmentFault
from upcycle.trainers.recipe.training_recipe import OptimizerRecipe

PEAK = "peak_lr"  # key of a parameter group: what a schedule multiplies


def make_optimizer(recipe: OptimizerRecipe, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over parameter groups with ``lr`` and ``weight_decay``; each remembers its peak learning rate.

    Raises:
        EnvironmentFault: DeepSpeed's cannot be built here.
    """
    given = [{**part, PEAK: part["lr"]} for group in groups for part in _divided_apart(group)]
    if recipe.name == "sgd":
        return torch.optim.SGD(given, momentum=recipe.momentum)
    settings: dict[str, Any] = {"betas": recipe.betas, "eps": recipe.epsilon}
    if recipe.name == "cpu_adamw":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        try:
            optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(given, adamw_mode=True, **settings)
            return optimizer
        except Exception as error:  # compilers fail in many ways
            raise EnvironmentFault(
                f"DeepSpeed's cpu_adamw cannot be built here: {error}", hint="optimizer.name: adamw"
            ) from None
    # One pass over weights, gradients and moments instead of ten: on CPUs, too, a few times as fast.
    return torch.optim.AdamW(given, fused=True, **settings)


def _divided_apart(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Experts that AutoEP divides among ranks in a group of their own, named and marked as DeepSpeed wants it."""
    divided = [parameter for parameter in group["params"] if not getattr(parameter, "allreduce", True)]
    if not divided:
        return [group]
    whole = [parameter for parameter in group["params"] if getattr(parameter, "allreduce", True)]
    parts = [{**group, "params": divided, "moe": True, "name": divided[0].group_name}]
    return [*([{**group, "params": whole}] if whole else []), *parts]


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
