"""The keys of a conversion recipe as typed keyword arguments, which editors complete and type checkers check.

:class:`upcycle.recipe.conversion_recipe.Recipe` validates them and says what they mean; a test compares both.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from upcycle.recipe.recipe_parts import PartName


class RouterKeys(TypedDict, total=False):
    """Keys of ``router``."""

    name: str
    parameters: dict[str, Any]


class RoutingKeys(TypedDict, total=False):
    """Keys of ``routing``."""

    rule: Literal["top_k", "dynamic_k", "threshold", "relu", "expert_choice", "causal_choice"]
    scores: Literal["softmax", "sigmoid", "ones"] | None
    normalized: bool | None
    spread: float | None
    tau: float | None
    threshold: float | None
    capacity_factor: float | None
    group: Literal["sequence", "batch"] | None


class CalibrationKeys(TypedDict, total=False):
    """Keys of ``calibration``."""

    text: str | list[str] | None
    tokens: int
    window: int
    mode: Literal["auto", "parallel", "sequential"]
    column: str
    target: str | None


class ReconstructionKeys(TypedDict, total=False):
    """Keys of ``reconstruction``."""

    passes: int
    batch: int
    rate: float


class SourceKeys(TypedDict, total=False):
    """Keys of one of ``sources``."""

    name: str
    revision: str | None
    weight: float
    positive_prompts: list[str]
    negative_prompts: list[str]
    text: str | list[str] | None
    shared: bool
    scale: float
    noise: float


class VerificationKeys(TypedDict, total=False):
    """Keys of ``verification``."""

    enabled: bool
    text: str | None
    tokens: int


class PrecisionKeys(TypedDict, total=False):
    """Keys of ``precision``."""

    bits: str | None
    attention_bits: int
    rounding: Literal["gptq", "nearest"]
    allocation: Literal["layers", "mc_moe", "first", "frequency", "outliers", "even"]
    group: int


class ProjectionsKeys(TypedDict, total=False):
    """Keys of ``projections``."""

    experts: int
    flops: float
    tau: float | None
    hoyer: float
    tokens: int
    epochs: int
    batch: int
    rate: float


class RecipeKeys(TypedDict, total=False):
    """All keys but ``source``; where a key has keys of its own, its short forms are types beside them."""

    revision: str | None
    sources: str | list[str | SourceKeys]
    method: str
    parameters: dict[str, Any]
    experts: int
    top_k: int
    shared: int
    active: float | None
    pieces: int
    width: int | None
    always_on: float
    shared_unheld: Literal["refuse", "route"]
    keep: float | None
    observations: str | None
    precision: str | int | PrecisionKeys
    layers: str | list[int]
    router: str | RouterKeys
    routing: str | RoutingKeys
    projections: int | ProjectionsKeys
    calibration: str | list[str] | CalibrationKeys
    refit: Literal["auto", "down", "blocks", "scale", "none"]
    reconstruction: ReconstructionKeys
    scale: Literal["auto", "exact", "sum", "paper"] | float
    family: Literal["auto", "auto-wrap"]
    part: PartName | list[PartName]
    pad: bool
    target: str
    layout: Literal["per-expert", "fused"]
    dtype: Literal["keep", "bfloat16", "float16", "float32"]
    max_shard_size: str
    tokenizer: Literal["copy", "none"]
    seed: int
    verification: VerificationKeys
