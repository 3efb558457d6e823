"""Plans training: its memory, traffic and speed under every way to divide it, from configurations and file headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.adapters.live import parameter_of
from upcycle.architectures.module_paths import find_module_paths
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.locate import is_local, locate
from upcycle.notebook import HtmlShown
from upcycle.recipe.conversion_recipe import read_recipe
from upcycle.recipe.shipped_recipes import needed_recipe_file
from upcycle.trainers.checkpoints.prepare_model import parent_folder
from upcycle.trainers.distributed import expert_parallel
from upcycle.trainers.forecast.communication import CommunicationForecast, forecast_communication
from upcycle.trainers.forecast.memory import MemoryForecast, forecast_memory
from upcycle.trainers.forecast.model_counts import ModelCounts, count_model
from upcycle.trainers.forecast.ranks_planned import World, parse_world
from upcycle.trainers.forecast.speed import SpeedForecast, forecast_speed
from upcycle.trainers.forecast.upcycling_law import advice
from upcycle.trainers.forecast.zero_division import Division
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.recipe.training_recipe import (
    StageRecipe,
    TrainRecipe,
    accumulation,
    parse_train_recipe,
    read_train_recipe,
)

USABLE = 0.9  # fraction of a device's memory: the driver, buffers of collectives and fragmentation take the rest
_GROWN = (
    1.05  # a MoE with more than so many times its parent's weights has copies, which the rules on upcycling are about
)
_MISSING = {"output": "RUN", "data": "demo"}  # keys that a recipe may leave out for planning


@dataclass(frozen=True)
class Option:
    """One way to divide the run, with its estimates: memory of the stage that needs most, traffic and speed of the slowest."""

    zero_stage: int
    expert_parallel: int
    memory: MemoryForecast
    communication: CommunicationForecast
    speed: SpeedForecast
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "zero": self.zero_stage,
            "expert_parallel": self.expert_parallel,
            "fits": self.fits,
            "memory": self.memory.as_dict(),
            "communication": self.communication.as_dict(),
            "speed": self.speed.as_dict(),
        }


@dataclass(frozen=True)
class TrainingPlan(HtmlShown):
    """Estimates for every division that the trainer accepts, and which of them to choose."""

    world: World
    counts: ModelCounts
    steps: int
    tokens: int
    options: tuple[Option, ...]
    own: Option | None  # the division that the recipe itself has
    recommended: Option | None
    refused: str  # why experts cannot be divided; empty if they can
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        device = self.world.device
        facts = ("name", "flops", "memory", "bandwidth", "link", "network", "source")
        return {
            "kind": "estimate",
            "world": str(self.world),
            "ranks": self.world.size,
            "device": {key: getattr(device, key) for key in facts},
            "parameters": self.counts.elements,
            "parameters_active": self.counts.active,
            "flops_per_token": self.counts.flops.total,
            "steps": self.steps,
            "tokens": self.tokens,
            "options": [option.as_dict() for option in self.options],
            "own": self.own.as_dict() if self.own else None,
            "recommended": self.recommended.as_dict() if self.recommended else None,
            "refused": self.refused,
            "warnings": list(self.warnings),
        }


def plan_training(
    recipe: TrainRecipe | Mapping[str, Any] | str | Path,
    world: World | str | None = None,
    dense_tokens: float | None = None,
    dense: str | None = None,
) -> TrainingPlan:
    """Plan a run without reading a weight.

    Args:
        recipe: a recipe, its keys, or its file.
        world: the ranks, such as ``2x8xH100``; ``None``: this machine.
        dense_tokens: how many tokens the dense model was trained on, for the rules on training from scratch.
        dense: the dense model, if the model's record does not name what it was converted from.

    Raises:
        UpcycleError: :func:`upcycle.train` would refuse the recipe's own division for the same reason.
    """
    if isinstance(recipe, (str, Path)):
        recipe = read_planned(Path(recipe))
    elif not isinstance(recipe, TrainRecipe):
        recipe = parse_train_recipe({**_MISSING, **recipe}, "recipe")
    ranks = world if isinstance(world, World) else parse_world(world)
    folder, raw = _config(recipe.model)
    stages = [(stage, *_counts(recipe, stage, folder, raw, ranks.device.kind)) for stage in recipe.stages]
    counts = stages[0][1]
    accumulation(recipe, ranks.size)
    _check_own(recipe, counts, ranks.size)
    options = [_option(recipe, stages, ranks, *pair) for pair in _pairs(recipe, counts, ranks.size)]
    wanted = (recipe.zero_stage(ranks.size), recipe.expert_parallel)
    own = next((option for option in options if (option.zero_stage, option.expert_parallel) == wanted), None)
    tokens = sum(recipe.steps_of(stage) for stage in recipe.stages) * recipe.tokens_per_step
    return TrainingPlan(
        world=ranks,
        counts=counts,
        steps=tokens // recipe.tokens_per_step,
        tokens=tokens,
        options=tuple(options),
        own=own,
        recommended=_recommended(options),
        refused=_refusal(recipe, counts, ranks.size),
        warnings=(*_file_warnings(folder, counts), *_advice(recipe, counts, folder, dense_tokens, dense, tokens)),
    )


def read_planned(path: Path, overlaid: dict[str, Any] | None = None) -> TrainRecipe:
    """Read a recipe for planning, which may leave out its output and its data.

    Args:
        path: its file, or the name of a recipe that comes with upcycle.
        overlaid: values by dotted path, laid over its keys.

    Raises:
        UsageError: the file is missing, or not such a recipe.
    """
    given, path = overlaid or {}, needed_recipe_file(str(path), "train")
    known = {key.partition(".")[0] for key in (*read_recipe(path), *given)}
    return read_train_recipe(path, {**{k: v for k, v in _MISSING.items() if k not in known}, **given})


def _config(model: str) -> tuple[Path, dict[str, Any]]:
    folder = locate(model, config_only=not is_local(model)).path
    if not folder.is_dir():
        raise UsageError(f"model: {model} is a file", hint="train what upcycle convert wrote, or a stock folder")
    return folder, read_json(folder / "config.json")


def _counts(
    recipe: TrainRecipe, stage: StageRecipe, folder: Path, raw: dict[str, Any], device: str
) -> tuple[ModelCounts, ModelCounts | None]:
    student = count_model(raw, str(folder), recipe.length, stage.train, recipe.experts, device, recipe.adapter)
    if stage.distillation is None:
        return student, None
    parent = parent_folder(stage.distillation.parent, folder)
    return student, count_model(read_json(parent / "config.json"), str(parent), recipe.length)


def _check_own(recipe: TrainRecipe, counts: ModelCounts, world: int) -> None:
    size = recipe.expert_parallel
    if size == 1:
        return
    if size > counts.experts:
        raise UsageError(
            f"expert_parallel {size} is more than the {counts.experts} experts of a layer",
            hint=f"set expert_parallel to a divisor of {counts.experts}"
            if counts.experts
            else "set expert_parallel: 1",
        )
    expert_parallel.check(counts.model_type, counts.experts, size, world)
    reason = _undividable(recipe)
    if recipe.zero_stage(world) < 3 and not all(map(_trains_experts, recipe.stages)):
        reason = "a stage trains no expert, and below ZeRO's stage 3 DeepSpeed's AutoEP needs one that trains"
    if reason:
        raise UsageError(f"expert_parallel {size}: {reason}", hint="set expert_parallel: 1, or change that stage")


def _undividable(recipe: TrainRecipe) -> str:
    """Why the stages of a recipe do not allow experts to be divided; empty if they do."""
    if recipe.adapter:
        return "an adapter's pairs are added to whole experts"
    for stage in recipe.stages:
        if stage.control != ControlParameters():
            return f"stage '{stage.name}' has control, which needs stock routers"
        if _needs_every_expert(stage):
            return f"stage '{stage.name}' has losses that run every expert on every rank"
    return ""


def _trains_experts(stage: StageRecipe) -> bool:
    """Whether a stage may train experts; a pattern may, as it is not compared with the model's names here."""
    return any(word in ("all", "experts") or "*" in word for word in stage.train)


def _needs_every_expert(stage: StageRecipe) -> bool:
    distillation = stage.distillation
    return distillation is not None and bool(distillation.taught)


def _refusal(recipe: TrainRecipe, counts: ModelCounts, world: int) -> str:
    if not counts.experts or world == 1:
        return ""
    try:
        expert_parallel.check(counts.model_type, counts.experts, 1, world)
    except UsageError as error:
        return error.message.partition(": ")[2]
    return _undividable(recipe)


def _pairs(recipe: TrainRecipe, counts: ModelCounts, world: int) -> Iterator[tuple[int, int]]:
    """Every pair of a ZeRO stage and a number of ranks that share experts, that the trainer accepts."""
    for stage in range(4):
        if stage == 0 and ((recipe.dtype == "bfloat16" and world > 1) or recipe.zero.offload_optimizer):
            continue
        if stage != 3 and recipe.zero.offload_weights:
            continue
        if stage == 3 and (recipe.adapter or any(map(_needs_every_expert, recipe.stages))):
            continue
        yield stage, 1
        divisible = stage == 3 or all(map(_trains_experts, recipe.stages))
        if stage and counts.experts and divisible and not _refusal(recipe, counts, world):
            sizes = (size for size in range(2, counts.experts + 1) if not counts.experts % size and not world % size)
            yield from ((stage, size) for size in sizes)


def _option(
    recipe: TrainRecipe,
    stages: list[tuple[StageRecipe, ModelCounts, ModelCounts | None]],
    world: World,
    zero: int,
    size: int,
) -> Option:
    found = []
    for stage, counts, parent in stages:
        division = Division(recipe, counts, world.size, zero, size, stage)
        communication = forecast_communication(division, parent)
        memory = forecast_memory(division, parent)
        found.append((memory, communication, forecast_speed(division, world, communication, parent)))
    memory = max((each[0] for each in found), key=lambda each: each.total)
    slowest = min(found, key=lambda each: each[2].bound)
    return Option(zero, size, memory, slowest[1], slowest[2], memory.total <= USABLE * world.device.memory)


def _recommended(options: list[Option]) -> Option | None:
    """The fastest option that fits, if sending does not overlap with computing; of those within 1% of it the simplest.

    Simpler is to divide experts among fewer ranks, and then a lower stage.
    """
    fitting = [option for option in options if option.fits]
    if not fitting:
        return None
    best = max(option.speed.unoverlapped for option in fitting)
    good = [option for option in fitting if option.speed.unoverlapped >= 0.99 * best]
    return min(good, key=lambda option: (option.expert_parallel, option.zero_stage))


def _file_warnings(folder: Path, counts: ModelCounts) -> list[str]:
    """A warning if the headers of the weight files, where there are any, do not hold what the configuration describes."""
    if not any(folder.glob("*.safetensors")):
        return []
    stored = {name: spec.elements for name, spec in SafetensorsFolder(folder).specs.items()}
    head = stored.get(find_module_paths(counts.model_type).head_weight, 0)
    elements = sum(weight.elements for weight in counts.weights if parameter_of(weight.name) is None)
    if elements <= sum(stored.values()) <= elements + head + len(counts.layers) * (counts.experts or 0):
        return []
    return [f"{folder}: config.json describes {elements:,} weights, and the weight files hold {sum(stored.values()):,}"]


def _advice(
    recipe: TrainRecipe, counts: ModelCounts, folder: Path, dense_tokens: float | None, dense: str | None, tokens: int
) -> list[str]:
    if not dense_tokens or not counts.experts:
        return []
    try:
        parent = parent_folder(dense or "auto", folder)
    except UsageError as error:
        raise UsageError(
            f"--dense-tokens: {error.message.partition(': ')[2] or error.message}", hint="give --dense FOLDER"
        ) from None
    size = count_model(read_json(parent / "config.json"), str(parent), recipe.length).elements
    if counts.elements < _GROWN * size:
        return []
    return advice(dense_tokens, size, tokens, counts.active)
