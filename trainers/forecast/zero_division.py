"""How DeepSpeed divides a model among ranks, on which every forecast depends.

N ranks, e of which share the experts of a layer (expert parallelism), so that N / e hold the same experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from upcycle.trainers.forecast.model_counts import ModelCounts, Weight
from upcycle.trainers.losses.survey import Survey, needed
from upcycle.trainers.recipe.training_recipe import StageRecipe, TrainRecipe

# DeepSpeed's defaults, in elements (deepspeed/runtime/zero/config.py).
_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "prefetch_bucket_size": 50_000_000,
    "param_persistence_threshold": 100_000,
    "max_live_parameters": 1_000_000_000,
    "max_reuse_distance": 1_000_000_000,
}
ELEMENTS = {"float32": 4, "bfloat16": 2}  # bytes per element


@dataclass(frozen=True)
class Division:
    """One way to divide a run among ``world_size`` ranks: ZeRO's stage, and how many ranks share the experts of a layer.

    ``stage`` is the stage of the recipe that a forecast is for; ``None``: the first.
    """

    recipe: TrainRecipe
    counts: ModelCounts
    world_size: int
    zero_stage: int
    expert_parallel: int = 1
    stage: StageRecipe | None = None

    @property
    def item(self) -> int:
        """Bytes per element of weights and activations."""
        return ELEMENTS[self.recipe.dtype]

    @property
    def passes(self) -> int:
        """Passes of a rank per optimizer step."""
        return self.recipe.global_batch // (self.recipe.micro_batch * self.world_size)

    @property
    def survey(self) -> Survey:
        """Which models run forward once more in every pass, for losses over the whole batch."""
        stage = self.stage or self.recipe.stages[0]
        return needed(stage.losses, stage.distillation, self.passes, stage.losses_over)

    @property
    def tokens(self) -> int:
        """T: tokens of one pass of one rank, padding included."""
        return self.recipe.micro_batch * self.recipe.length

    @property
    def states(self) -> int:
        """How many states the optimizer keeps of every weight."""
        optimizer = self.recipe.optimizer
        return (1 if optimizer.momentum else 0) if optimizer.name == "sgd" else 2

    def setting(self, key: str) -> int:
        """One of DeepSpeed's sizes in elements, from the recipe or else DeepSpeed's default."""
        settings = self.recipe.zero.settings
        return int(settings.get(key, settings.get(f"stage3_{key}", _DEFAULTS[key])))

    def holders(self, weight: Weight) -> int:
        """How many ranks need the same part of a weight: it is among these that ZeRO divides it."""
        return self.world_size // self.expert_parallel if weight.divided else self.world_size

    def local(self, weights: Iterable[Weight]) -> float:
        """How many elements of ``weights`` one rank computes with."""
        return sum(weight.elements / (self.expert_parallel if weight.divided else 1) for weight in weights)

    def partition(self, weights: Iterable[Weight]) -> float:
        """How many elements of ``weights`` each rank owns once ZeRO has divided them among all."""
        return sum(weight.elements for weight in weights) / self.world_size

    @property
    def parent_item(self) -> int:
        """Bytes per element of the dense parent that the stage is distilled from, if it is."""
        distillation = (self.stage or self.recipe.stages[0]).distillation
        dtype = distillation.dtype if distillation else "auto"
        return self.item if dtype == "auto" else ELEMENTS[dtype]

    @property
    def divides_frozen(self) -> bool:
        """Whether ranks hold parts of models that do not train, too: they gather one layer at a time."""
        return self.zero_stage == 3 and self.world_size > 1

    @property
    def trained(self) -> list[Weight]:
        """The weights that train."""
        return [weight for weight in self.counts.weights if weight.trained]

    def persistent(self, weight: Weight) -> bool:
        """Whether ZeRO-3 keeps a weight whole on every rank because it is small."""
        elements = weight.elements / (self.expert_parallel if weight.divided else 1)
        return self.zero_stage == 3 and elements <= self.setting("param_persistence_threshold")
