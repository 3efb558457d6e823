"""What a run says when a rank has no memory left: the keys of its recipe that lower what it needs, by the plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from upcycle.errors import EnvironmentFault
from upcycle.hardware.memory import is_out_of_memory
from upcycle.trainers.distributed.ranks import Ranks
from upcycle.trainers.recipe.training_recipe import TrainRecipe

KEYS_NAMED = 3  # keys that are named
WORTH = 0.98  # of what is needed, at most, for a key to be named
_WITHOUT_A_PLAN = (
    "a smaller micro_batch or length, activation_checkpointing: true, or zero: {stage: 3} on more ranks needs less"
)


@contextmanager
def lowered_by_keys(recipe: TrainRecipe, ranks: Ranks) -> Iterator[None]:
    """Say of a lack of memory, of a device or of the host, which keys of the recipe would lower the need.

    Raises:
        EnvironmentFault: memory lacked.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        rank = f"rank {ranks.rank} of {ranks.world_size}" if ranks.world_size > 1 else "the run"
        raise EnvironmentFault(
            f"{rank} is out of memory: {said[0]}", hint=keys_that_need_less(recipe, ranks.world_size)
        ) from error


def keys_that_need_less(recipe: TrainRecipe, world_size: int) -> str:
    """A sentence that names keys by which the plan's estimate of a rank's peak falls, those of least consequence first.

    Args:
        recipe: the run's.
        world_size: its ranks.
    """
    try:
        needed = _planned(recipe, world_size)
        found = {text: _planned(changed, world_size) for text, changed in lighter(recipe, world_size).items()}
    except Exception:  # there may be no memory for a plan, either; or no plan, of models of parts
        return _WITHOUT_A_PLAN
    worth = [f"{text} ({size / 1e9:.2f} GB)" for text, size in found.items() if size < WORTH * needed][:KEYS_NAMED]
    if not worth:
        return f"the plan says {needed / 1e9:.2f} GB per rank: more ranks with zero: {{stage: 3}}, or a device with more memory"
    return f"the plan says {needed / 1e9:.2f} GB per rank; less with {', or '.join(worth)}"


def lighter(recipe: TrainRecipe, world_size: int) -> dict[str, TrainRecipe]:
    """Recipes that may need less, by the key that is set in each; those by which the run trains the same model come first."""

    def zero(**keys: object) -> TrainRecipe:
        return recipe.model_copy(update={"zero": recipe.zero.model_copy(update=keys)})

    found: dict[str, TrainRecipe] = {}
    if recipe.micro_batch > 1 and recipe.micro_batch % 2 == 0:
        half = recipe.micro_batch // 2
        found[f"micro_batch: {half}"] = recipe.model_copy(update={"micro_batch": half})
    if not recipe.activation_checkpointing:
        found["activation_checkpointing: true"] = recipe.model_copy(update={"activation_checkpointing": True})
    stage = recipe.zero_stage(world_size)
    if world_size > 1 and stage < 3:
        found["zero: {stage: 3}"] = zero(stage=3)
    if stage and not recipe.zero.offload_optimizer:
        found["zero: {offload_optimizer: true}"] = zero(offload_optimizer=True)
    if recipe.dtype == "float32":
        found["dtype: bfloat16"] = recipe.model_copy(update={"dtype": "bfloat16"})
    found[f"length: {recipe.length // 2}"] = recipe.model_copy(update={"length": recipe.length // 2})
    return found


def _planned(recipe: TrainRecipe, world_size: int) -> float:
    """The estimated peak of a rank, in bytes."""
    from upcycle.trainers.forecast.plan_training import plan_training
    from upcycle.trainers.forecast.ranks_planned import parse_world

    world = replace(parse_world(None), nodes=1, per_node=world_size)
    plan = plan_training(recipe, world)
    assert plan.own is not None
    return plan.own.memory.total
