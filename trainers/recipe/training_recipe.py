"""The recipe of a training run: model, data, stages, and how to run them; validated before anything is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from upcycle.errors import UsageError
from upcycle.files.formats.parsing import dump_yaml
from upcycle.plugins import StrictSettings
from upcycle.recipe.shipped_recipes import read_laid_over
from upcycle.recipe.validated import validated
from upcycle.registry import LOSSES, suggestion
from upcycle.trainers.recipe.adapter_recipe import AdapterRecipe, check_alone
from upcycle.trainers.recipe.data_recipe import DataRecipe
from upcycle.trainers.recipe.laid_keys import STAGE_NAME, lay
from upcycle.trainers.recipe.part_recipes import (
    AlarmParameters,
    BiasBalanceParameters,
    ControlParameters,
    DistillationParameters,
    ExpertTargetParameters,
    GroupParameters,
    MaskParameters,
)
from upcycle.trainers.recipe.schedules import PRESETS, Schedule, preset

STAGE_DEFAULT = ("all",)


class OptimizerRecipe(StrictSettings):
    """The optimizer and its numbers. Learning rates and weight decay belong to a stage."""

    name: Literal["adamw", "cpu_adamw", "sgd"] = Field(
        "adamw",
        description="adamw (torch), cpu_adamw (DeepSpeed's, for offloaded states; compiled when first used), or sgd",
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="adamw: decay rates of both moments")
    epsilon: float = Field(1e-8, gt=0, description="adamw: added to the root of the second moment")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd: momentum")


class ZeroRecipe(StrictSettings):
    """How DeepSpeed divides the optimizer's states, gradients and weights among ranks."""

    stage: Literal["auto", 0, 1, 2, 3] = Field(
        "auto",
        description="0 divides nothing, 1 optimizer states, 2 also gradients, 3 also weights (auto: 0 for one rank, else 1)",
    )
    offload_optimizer: bool = Field(False, description="keep optimizer states in the host's memory")
    offload_weights: bool = Field(False, description="stage 3: keep weights in the host's memory")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="further keys of DeepSpeed's zero_optimization, such as reduce_bucket_size"
    )


class SavingRecipe(StrictSettings):
    """When checkpoints are written, and how many are kept."""

    every: int = Field(500, ge=1, description="optimizer steps between checkpoints; one is always written at the end")
    keep: int = Field(2, ge=1, description="how many of the newest are kept")
    export: bool = Field(True, description="write OUTPUT/model, a stock transformers folder, at the end")


class LogRecipe(StrictSettings):
    """What is reported, how often and where."""

    every: int = Field(1, ge=1, description="steps between printed lines; log.jsonl has every step")
    validation: int = Field(0, ge=0, description="steps between validations; 0: only at the end of each stage")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="where numbers are sent in addition to log.jsonl"
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="what one device can do, to compute its utilisation [default: measured with a matrix product]",
    )


class DistillationRecipe(DistillationParameters, ExpertTargetParameters):
    """Distillation from a dense parent."""

    parent: str = Field(
        "auto", description="the dense model's folder, or auto: the one that the model was converted from"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype that the parent computes in [default: the run's dtype]"
    )
    cache: str | None = Field(
        None,
        description="folder that keeps the parent's most probable tokens, so that it runs only for rows that are new",
    )
    top_p: float = Field(0.95, gt=0, le=1, description="cache: how much of the probability is kept per position")
    most: int = Field(
        64, ge=1, description="cache: how many tokens are kept per position, at most; all others count as one"
    )

    @model_validator(mode="after")
    def _cacheable(self) -> DistillationRecipe:
        if self.cache is None:
            return self
        live = [*(name for name in ("hidden", "ffn", "preference") if getattr(self, name)), *self.taught]
        if live:
            raise ValueError(f"a cache holds only next-token distributions, and {live[0]} needs the running parent")
        if self.temperature != 1:
            raise ValueError(f"a cache holds probabilities at temperature 1, and temperature is {self.temperature:g}")
        return self


class ScheduleRecipe(StrictSettings):
    """A learning-rate schedule; its length is that of the stage."""

    kind: Literal["constant", "cosine", "wsd", "inverse_sqrt"] = Field(
        "cosine", description="constant, cosine, wsd or inverse_sqrt"
    )
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    floor: float = Field(0.1, ge=0, le=1, description="the last factor of cosine and wsd")
    decay: float = Field(0.2, gt=0, le=1, description="wsd: the fraction of all steps that decays")
    shape: Literal["linear", "sqrt"] = Field("linear", description="wsd: how it decays")
    position: int = Field(0, ge=0, description="inverse_sqrt: optimizer steps that the dense run has done")
    timescale: int = Field(
        10_000, ge=1, description="inverse_sqrt: the factor is 1 up to this step, counted with position"
    )


class PresetRecipe(StrictSettings):
    """A published way to reset the learning rate, instead of a schedule and a peak."""

    name: str = Field(description=f"one of {', '.join(PRESETS)}")
    dense_peak: float = Field(gt=0, description="peak learning rate of the dense run")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    position: int = Field(0, ge=0, description="sparse_upcycling: optimizer steps of the dense run")


class StageRecipe(StrictSettings):
    """One stage of training: what trains, for how long, on which data, with which losses."""

    name: str = Field(STAGE_NAME, pattern=r"^[\w.-]+$", description="its name in reports and folders")
    train: list[str] = Field(
        default=list(STAGE_DEFAULT),
        min_length=1,
        description="what trains: any of all, router, experts, rest, and patterns of parameter names with *",
    )
    steps: int | None = Field(None, ge=1, description="optimizer steps")
    tokens: int | None = Field(
        None, ge=1, description="tokens to train on, instead of steps; rounded up to whole steps"
    )
    learning_rate: float | None = Field(None, gt=0, description="peak learning rate")
    rates: dict[Literal["router", "experts", "rest"], float] = Field(
        default_factory=dict,
        description="factors on the learning rate of router, experts and rest; routers that the conversion fitted get a small one "
        "where none is named",
    )
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices (vectors have none)")
    router_weight_decay: float | None = Field(None, ge=0, description="weight decay of routers [default: weight_decay]")
    schedule: ScheduleRecipe = Field(default=ScheduleRecipe(), description="how the learning rate changes")
    preset: PresetRecipe | None = Field(None, description="learning rate and schedule of a paper, instead of your own")
    losses: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="auxiliary losses with their parameters (upcycle list losses)"
    )
    tower_losses: dict[Literal["vision", "connector"], dict[str, dict[str, Any]]] = Field(
        default_factory=dict, description="the same for the routers of the other parts, where the data have images"
    )
    losses_over: Literal["batch", "pass"] = Field(
        "batch",
        description="batch: losses are over the global batch, however it is divided; pass: over each pass alone, which costs less",
    )
    balance: BiasBalanceParameters | None = Field(None, description="balance loads by a bias on the choice of experts")
    control: ControlParameters = Field(
        default=ControlParameters(),
        description="noise, jitter, normalised logits, random second experts, and capacity",
    )
    masks: MaskParameters | None = Field(
        None, description="unmask what is new in a model that masked_growth made; in the first stage alone"
    )
    distillation: DistillationRecipe | None = Field(None, description="distillation from the dense parent")
    activation: str | None = Field(
        None, description="first replace the activation function of a dense model's FFNs (D2DMoE: relu)"
    )
    data: DataRecipe | None = Field(None, description="data of this stage, instead of the run's")

    @model_validator(mode="after")
    def _consistent(self) -> StageRecipe:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(f"stage '{self.name}' needs either steps or tokens")
        if (self.learning_rate is None) == (self.preset is None):
            raise ValueError(f"stage '{self.name}' needs either learning_rate or preset")
        unknown = [n for some in (self.losses, *self.tower_losses.values()) for n in some if n not in LOSSES]
        if unknown:
            raise ValueError(f"losses: unknown loss '{unknown[0]}'; {suggestion(unknown[0], LOSSES)}")
        self.control.check_taught(self.losses, self.name)
        if self.preset and self.preset.name not in PRESETS:
            raise ValueError(f"preset: unknown '{self.preset.name}'; {suggestion(self.preset.name, PRESETS)}")
        return self


class TrainRecipe(StrictSettings):
    """A training run. Keys of the written ``recipe.yaml`` are in the order of these fields."""

    model: str = Field(description="a folder that upcycle convert wrote, or any with a stock causal language model")
    output: str = Field(description="folder of the run, for checkpoints, log.jsonl and the trained model")
    data: DataRecipe = Field(description="domains of text, their weights, and what is held out")
    stages: list[StageRecipe] = Field(min_length=1, description="stages of training, one after another")
    length: int = Field(512, ge=8, description="tokens per row")
    global_batch: int = Field(8, ge=1, description="rows per optimizer step, over all ranks")
    micro_batch: int = Field(1, ge=1, description="rows per rank and pass; passes accumulate up to global_batch")
    seed: int = Field(0, ge=0, description="seed of every random choice")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype that the model computes in; with bfloat16 the optimizer keeps fp32 weights"
    )
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: no clipping")
    optimizer: OptimizerRecipe = Field(default=OptimizerRecipe(), description="the optimizer")
    adapter: AdapterRecipe | None = Field(
        None, description="train low-rank matrices beside the weights (LoRA), which stay as they are"
    )
    dense_states: str | None = Field(
        None, description="a training run of the dense model, whose optimizer states the MoE begins with"
    )
    zero: ZeroRecipe = Field(default=ZeroRecipe(), description="how DeepSpeed divides the run among ranks")
    expert_parallel: int = Field(1, ge=1, description="ranks that share the experts of a layer (DeepSpeed AutoEP)")
    experts: str = Field(
        "auto",
        description="transformers' experts implementation: upcycle, upcycle_lean, eager, grouped_mm, ..., or auto",
    )
    activation_checkpointing: bool = Field(False, description="recompute layers in the backward pass to save memory")
    keep_memory: bool = Field(
        False, description="on CPUs: keep freed memory for the next step; faster, but up to twice the memory"
    )
    saving: SavingRecipe = Field(default=SavingRecipe(), description="checkpoints and export")
    log: LogRecipe = Field(default=LogRecipe(), description="reports")
    alarms: AlarmParameters = Field(default=AlarmParameters(), description="when to warn")
    bad_steps: int = Field(
        3, ge=0, description="how many steps in a row may be skipped because the loss or gradient is not finite"
    )
    timeout: float = Field(1800.0, gt=0, description="seconds that ranks wait for each other")

    @field_validator("stages", mode="before")
    @classmethod
    def _one_stage(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _consistent(self) -> TrainRecipe:
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stages: two are called '{twice[0]}'; give each its own name")
        for stage in self.stages:
            if self.data_of(stage).dynamic and not self.log.validation:
                raise ValueError(
                    f"stage '{stage.name}': dynamic weights follow validations, and log.validation is 0, so they would never change"
                )
            schedule = stage.preset or stage.schedule
            steps = stage.steps or math.ceil((stage.tokens or 1) / (self.global_batch * self.length))
            if schedule.warmup >= steps and schedule.warmup:
                raise ValueError(f"stage '{stage.name}': warmup {schedule.warmup} must be less than its {steps} steps")
        if self.zero.stage == 0 and self.expert_parallel > 1:
            raise ValueError("zero.stage 0 cannot divide experts among ranks; use 1, 2 or 3")
        if self.zero.offload_weights and self.zero.stage != 3:
            raise ValueError(f"zero.offload_weights needs zero.stage 3, got {self.zero.stage}")
        if self.adapter:
            check_alone(self)
        return self

    def zero_stage(self, world_size: int) -> int:
        """ZeRO's stage on ``world_size`` ranks.

        Raises:
            UsageError: it is 0, and gradients of several ranks would be added up in bfloat16.
        """
        if self.zero.stage == 0 and self.dtype == "bfloat16" and world_size > 1:
            raise UsageError(
                f"zero.stage 0 would add up gradients of {world_size} ranks in bfloat16, which rounds them",
                hint="set zero.stage to 1, 2 or 3, or leave it out",
            )
        if self.zero.stage != "auto":
            return self.zero.stage
        return 0 if world_size == 1 and not self.zero.offload_optimizer else 1

    def data_of(self, stage: StageRecipe) -> DataRecipe:
        """What a stage trains on."""
        return stage.data or self.data

    def data_key(self, stage: StageRecipe) -> str:
        """The key, as ``--set`` takes it, under which that stands."""
        return f"stages.{stage.name}.data" if stage.data else "data"

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step over all ranks, padding included."""
        return self.global_batch * self.length

    def steps_of(self, stage: StageRecipe) -> int:
        """Number of optimizer steps of a stage."""
        return stage.steps or math.ceil((stage.tokens or 1) / self.tokens_per_step)

    def rate_and_schedule(self, stage: StageRecipe) -> tuple[GroupParameters, Schedule]:
        """The peak learning rates of a stage's parameter groups, and the schedule that they share."""
        steps = self.steps_of(stage)
        if stage.preset:
            chosen = stage.preset
            peak, schedule = preset(chosen.name, chosen.dense_peak, steps, chosen.warmup, chosen.position)
        else:
            assert stage.learning_rate
            peak, schedule = stage.learning_rate, Schedule(steps=steps, **stage.schedule.model_dump())
        rates = GroupParameters(
            learning_rate=peak,
            weight_decay=stage.weight_decay,
            router_weight_decay=stage.router_weight_decay,
            **stage.rates,
        )
        return rates, schedule

    def dump(self) -> str:
        """The recipe as YAML, with every key written out."""
        return dump_yaml(self.model_dump(mode="json"))


def parse_train_recipe(content: Any, where: str) -> TrainRecipe:
    """Make a recipe of a mapping; ``where`` it stands is for errors.

    Raises:
        UsageError: a key or value is wrong; names the key's path, the value and ``where``.
    """
    return validated(TrainRecipe, content, where)


def read_train_recipe(path: Path, overlaid: Mapping[str, Any] | None = None) -> TrainRecipe:
    """Read a YAML recipe.

    Args:
        path: its file, or the name of a recipe that comes with upcycle.
        overlaid: values by dotted path, laid over its keys.

    Raises:
        UsageError: the file is missing, not YAML, or not a training recipe.
    """
    return read_laid_over(TrainRecipe, path, "train", overlaid, lay_training)


def lay_training(content: dict[str, Any], path: str, value: Any) -> None:
    """Set one key of a training recipe, as :func:`~upcycle.trainers.recipe.laid_keys.lay` says."""
    lay(content, path, value, StageRecipe.model_fields)


def accumulation(recipe: TrainRecipe, world_size: int) -> int:
    """Number of passes per optimizer step on each rank.

    Raises:
        UsageError: the global batch cannot be divided among the ranks.
    """
    steps, rest = divmod(recipe.global_batch, recipe.micro_batch * world_size)
    if rest or not steps:
        raise UsageError(
            f"global_batch {recipe.global_batch} is not a multiple of micro_batch {recipe.micro_batch} x {world_size} ranks",
            hint=f"set global_batch to a multiple of {recipe.micro_batch * world_size}, or a smaller micro_batch",
        )
    return steps
