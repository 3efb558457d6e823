"""The optimizer of a recipe, its learning rates, and the names of its states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from upcycle.errors import EnvironmentFault
from upcycle.trainers.recipe.training_recipe import OptimizerRecipe

PEAK = "peak_lr"  # key of a parameter group: the learning rate that a schedule's factor multiplies


def make_optimizer(recipe: OptimizerRecipe, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the optimizer for parameter groups.

    Args:
        recipe: which one, with its numbers.
        groups: as :func:`parameter_groups.groups` gives them; their ``lr`` is kept as the peak learning rate.

    Raises:
        EnvironmentFault: DeepSpeed's optimizer cannot be built on this machine.
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
                f"DeepSpeed's cpu_adamw cannot be built here: {error}", hint="set optimizer.name: adamw"
            ) from None
    # Fused: one pass over weights, gradients and moments instead of ten, which is a few times as fast on CPUs, too.
    return torch.optim.AdamW(given, fused=True, **settings)


def _divided_apart(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a group: experts that AutoEP divides among ranks go into one of their own, named and marked as DeepSpeed requires."""
    divided = [parameter for parameter in group["params"] if not getattr(parameter, "allreduce", True)]
    if not divided:
        return [group]
    whole = [parameter for parameter in group["params"] if getattr(parameter, "allreduce", True)]
    parts = [{**group, "params": divided, "moe": True, "name": divided[0].group_name}]
    return [*([{**group, "params": whole}] if whole else []), *parts]


def state_keys(recipe: OptimizerRecipe) -> tuple[str, ...]:
    """Names of the states that the optimizer keeps of every parameter."""
    if recipe.name == "sgd":
        return ("momentum_buffer",) if recipe.momentum else ()
    return ("exp_avg", "exp_avg_sq")


def set_rates(optimizer: Any, factor: float) -> float:
    """Set every group's learning rate to its peak times ``factor``; returns the largest."""
    for group in optimizer.param_groups:
        group["lr"] = group[PEAK] * factor
    return max(float(group["lr"]) for group in optimizer.param_groups)
