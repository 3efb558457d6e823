"""One optimizer step of a batch that is divided among ranks and passes. Ranks are threads, each with a copy of the model."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Barrier
from typing import Any

import torch

from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.distillation.parent import Parent
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.recipe.training_recipe import StageRecipe
from upcycle.trainers.run.step import Stepper
from upcycle.trainers.run.step_result import StepResult


class Together:
    """What threads add up."""

    def __init__(self, world: int) -> None:
        self.barrier, self.given = Barrier(world, timeout=60), [torch.empty(0)] * world

    def total(self, rank: int, tensor: torch.Tensor) -> torch.Tensor:
        self.given[rank] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(torch.stack(self.given).sum(0))
        self.barrier.wait()
        return tensor


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    together: Any = None

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = self.together.total(self.rank, tensor)
        return total


class Engine:
    """What a step asks of DeepSpeed's, with gradients averaged over passes."""

    def __init__(self, module: Any, passes: int) -> None:
        self.module, self.passes, self.calls = module, passes, 0

    def __call__(self, **inputs: Any) -> Any:
        self.calls += 1
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.passes).backward()

    def step(self) -> None: ...

    def zero_optimization_stage(self) -> int:
        return 1

    def get_global_grad_norm(self) -> float:
        return 1.0

    def was_step_applied(self) -> bool:
        return True


def divided_step(
    model: Any, parent: Any, stage: dict[str, Any], world: int, passes: int, batch: PackedBatch
) -> tuple[StepResult, list[torch.Tensor], Engine]:
    """A step's result, the averaged gradient, and the first rank's engine, of a batch divided among ranks and passes."""
    recipe = StageRecipe.model_validate({"steps": 1, "learning_rate": 1.0, **stage})
    together, size = Together(world), len(batch.ids) // world // passes

    def rank(number: int) -> tuple[StepResult, list[torch.Tensor], Engine]:
        own = copy.deepcopy(model).train()
        taught = Parent(lambda: copy.deepcopy(parent), recipe.distillation) if recipe.distillation else None
        stepper = Stepper(own, recipe, ThreadRanks(number, world, torch.device("cpu"), together), taught, 0.0)
        stepper.attach()
        engine = Engine(own, passes)
        # As the stream gives them: all ranks' rows of a pass lie together.
        starts = [(number_of_pass * world + number) * size for number_of_pass in range(passes)]
        parts = [(batch.each(lambda part, at=start: part[at : at + size]), start) for start in starts]  # type: ignore[misc]
        batches = [replace(part, domains=batch.domains[start : start + size]) for part, start in parts]
        result = stepper.step(engine, batches, 1.0)
        return result, [p.grad for p in own.parameters() if p.grad is not None], engine

    with ThreadPoolExecutor(world) as pool:
        found = list(pool.map(rank, range(world)))
    gradients = [torch.stack(each).mean(0) for each in zip(*(gradient for _, gradient, _ in found), strict=True)]
    return found[0][0], gradients, found[0][2]


def far(actual: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference between gradients, relative to each one's largest number."""
    pairs = zip(actual, wanted, strict=True)
    return max(float((a - w).abs().max() / w.abs().max().clamp(min=1e-12)) for a, w in pairs)
