"""How DeepSpeed divides a model: what every forecast is asked for.

N ranks, e of which share the experts of a layer (expert parallelism), so that N / e hold the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from upcycle.trainers.forecast.model_counts import ModelCounts, Weight
from upcycle.trainers.losses.survey import Survey, needed
from upcycle.trainers.recipe.training_recipe import StageRecipe, TrainRecipe

# DeepSpeed's own values of what recipes leave out (deepspeed/runtime/zero/config.py), in elements.
_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "prefetch_bucket_size": 50_000_000,
    "param_persistence_threshold": 100_000,
    "max_live_parameters": 1_000_000_000,
    "max_reuse_distance": 1_000_000_000,
}
ELEMENTS = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Division:
    """One way to divide a run: ZeRO's stage and the ranks that share experts, of so many ranks.

    ``stage`` is the stage of the recipe that is asked about; ``None``: its first.
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
        """Which models run forward once more in every pass, for losses of the whole batch."""
        stage = self.stage or self.recipe.stages[0]
        return needed(stage.losses, stage.distillation, self.passes, stage.losses_over)

    @property
    def tokens(self) -> int:
        """T: positions of one pass of one rank."""
        return self.recipe.micro_batch * self.recipe.length

    @property
    def states(self) -> int:
        """Tensors the optimizer keeps of every weight."""
        optimizer = self.recipe.optimizer
        return (1 if optimizer.momentum else 0) if optimizer.name == "sgd" else 2

    def setting(self, key: str) -> int:
        """One of DeepSpeed's sizes, as the recipe or DeepSpeed has it."""
        own = self.recipe.zero.settings
        return int(own.get(key, own.get(f"stage3_{key}", _DEFAULTS[key])))

    def holders(self, weight: Weight) -> int:
        """Ranks that would hold the same part of a weight, if ZeRO divided nothing: among these ZeRO divides it."""
        return self.world_size // self.expert_parallel if weight.divided else self.world_size

    def local(self, weights: Iterable[Weight]) -> float:
        """Elements of some weights that one rank computes with."""
        return sum(weight.elements / (self.expert_parallel if weight.divided else 1) for weight in weights)

    def partition(self, weights: Iterable[Weight]) -> float:
        """Elements of some weights that are one rank's own once ZeRO has divided them: each is on one rank of all."""
        return sum(weight.elements for weight in weights) / self.world_size

    @property
    def trained(self) -> list[Weight]:
        """What the optimizer steps on."""
        return [weight for weight in self.counts.weights if weight.trained]

    def persistent(self, weight: Weight) -> bool:
        """Whether ZeRO-3 keeps a weight whole on every rank, as it is small."""
        elements = weight.elements / (self.expert_parallel if weight.divided else 1)
        return self.zero_stage == 3 and elements <= self.setting("param_persistence_threshold")
