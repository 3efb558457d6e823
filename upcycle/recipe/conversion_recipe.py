"""Validates the recipe, which holds everything that decides a conversion, before any weight is read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from upcycle.errors import UsageError
from upcycle.files.formats.parsing import dump_yaml, read_yaml
from upcycle.files.local_names import here
from upcycle.plugins import StrictSettings
from upcycle.recipe.precision_recipe import PrecisionRecipe
from upcycle.recipe.projections_recipe import ProjectionsRecipe
from upcycle.recipe.recipe_parts import (
    CalibrationRecipe,
    PartName,
    ReconstructionRecipe,
    RouterRecipe,
    RoutingRecipe,
    SourceRecipe,
    VerificationRecipe,
)
from upcycle.recipe.validated import validated

RefitKind = Literal["down", "blocks", "scale", "none"]
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Recipe(StrictSettings):
    """Holds all settings of a conversion, in the order in which ``recipe.yaml`` has them."""

    source: str = Field(
        description="local folder, hub id, .gguf file, or demo; of several sources the one whose config and tokenizer are used"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    sources: list[SourceRecipe] = Field(
        default_factory=list,
        description="fine-tunes of one model, names or mappings: a mixing method makes experts of them; source defaults to the first",
    )
    method: str = Field("sparse_upcycling", description="how experts are made (upcycle list methods)")
    parameters: dict[str, Any] = Field(default_factory=dict, description="the method's own parameters")
    experts: int = Field(8, ge=1, description="routed experts per MoE layer")
    top_k: int = Field(2, ge=1, description="experts per token")
    shared: int = Field(0, ge=0, description="shared experts: always on, split off before the routed ones")
    active: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="fraction of the FFN neurons that run per token, all layers together: sets experts, top_k and shared of a "
        "split; of static_prune, the fraction that is kept",
    )
    pieces: int = Field(
        12,
        ge=4,
        description="with active: about how many experts an FFN is split into, shared ones included: the nearest number whose "
        "width hardware has (64, 128, ... neurons; below a hidden size of 1,024: 32, 48, ...)",
    )
    width: int | None = Field(
        None,
        ge=1,
        description="with active: the neurons per expert, in the place of pieces; of static_prune, the neurons that every FFN "
        "keeps, in the place of active",
    )
    always_on: float = Field(
        0.8, gt=0, lt=1, description="with active: the part of the running neurons that is in shared experts"
    )
    shared_unheld: Literal["refuse", "route"] = Field(
        "refuse",
        description="if the target holds no shared experts: refuse, or make them routed ones (top-k grows by their number)",
    )
    keep: float | None = Field(
        None,
        gt=0,
        le=1,
        description="of a method that compresses a MoE: the part of every layer's experts that is kept",
    )
    observations: str | None = Field(
        None, description="of such a method: the file of upcycle observe, in the place of a pass over calibration text"
    )
    precision: PrecisionRecipe = Field(
        default=PrecisionRecipe(), description="of such a method: the bits that weights are stored in"
    )
    layers: str | list[int] = Field(
        "all",
        description="all, even (0, 2, ...), odd or every-other (1, 3, ...), last-half, except-first:N, except-last:N, or a list "
        "such as 0,2,4",
    )
    router: RouterRecipe = Field(default=RouterRecipe(), description="router initialiser")
    routing: RoutingRecipe = Field(default=RoutingRecipe(), description="routing rule")
    projections: ProjectionsRecipe = Field(
        default=ProjectionsRecipe(), description="experts of attention's projections, of --target upcycle_moe"
    )
    calibration: CalibrationRecipe = Field(default=CalibrationRecipe(), description="the text to calibrate on")
    refit: Literal["auto", "down", "blocks", "scale", "none"] = Field(
        "auto",
        description="fit to the dense output: down projections (closed form), blocks (then all projections of a layer are "
        "trained), a scale per layer, or none (auto: down if calibrated)",
    )
    reconstruction: ReconstructionRecipe = Field(
        default=ReconstructionRecipe(), description="how refit: blocks trains each layer"
    )
    scale: Literal["auto", "exact", "sum", "paper"] | float = Field(
        "auto",
        description="scale of the routed experts: exact, sum, paper, or a number (auto: sum when calibrated, else exact)",
    )
    family: Literal["auto", "auto-wrap"] = Field(
        "auto",
        description="auto: by config.json; auto-wrap: a model that nobody described is tried, to find its FFNs, and wrapped "
        "(target upcycle_moe)",
    )
    part: PartName | list[PartName] = Field(
        "auto",
        description="the part whose FFNs are converted, or several: of a model of parts (upcycle list wrappers) language, vision, "
        "connector, or all that it has, of two towers or of an encoder and a decoder either or both; auto: language, or both",
    )
    pad: bool = Field(False, description="pad the FFN with zero neurons when the experts do not divide it (exact)")
    target: str = Field("auto", description="MoE architecture to write (upcycle list targets), or auto")
    layout: Literal["per-expert", "fused"] = Field(
        "per-expert",
        description="per-expert: old and new releases load it; fused: as transformers 5 holds it in memory",
    )
    dtype: Literal["keep", "bfloat16", "float16", "float32"] = Field("keep", description="dtype of the written weights")
    max_shard_size: str = Field("5GB", description="largest weight file, e.g. 500MB or 5GB; a layer is never divided")
    tokenizer: Literal["copy", "none"] = Field("copy", description="copy the tokenizer, or write none")
    seed: int = Field(0, ge=0, description="seed of every random choice")
    verification: VerificationRecipe = Field(default=VerificationRecipe(), description="the check at the end")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that ``part`` names."""
        return (self.part,) if isinstance(self.part, str) else tuple(self.part)

    @field_validator("sources", mode="before")
    @classmethod
    def _sources_by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list):
            return value
        return [{"name": part} if isinstance(part, str) else part for part in value]

    @model_validator(mode="before")
    @classmethod
    def _first_of_several(cls, content: Any) -> Any:
        """Take the first of ``sources``, at its revision, as ``source`` where that is missing."""
        if not isinstance(content, dict) or content.get("source") or not content.get("sources"):
            return content
        named = cls._sources_by_name(content["sources"])
        first = named[0] if isinstance(named, list) and named else None
        if isinstance(first, SourceRecipe):
            first = first.model_dump()
        if not isinstance(first, dict) or not isinstance(first.get("name"), str):
            return {**content, "source": "?"}  # validating sources fails next, and says what is wrong
        return {**content, "source": first["name"], "revision": first.get("revision")}

    @field_validator("router", mode="before")
    @classmethod
    def _router_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("routing", mode="before")
    @classmethod
    def _routing_by_rule(cls, value: Any) -> Any:
        return {"rule": value} if isinstance(value, str) else value

    @field_validator("calibration", mode="before")
    @classmethod
    def _calibration_by_text(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, (str, list)) else value

    @field_validator("part", mode="before")
    @classmethod
    def _several_parts(cls, value: Any) -> Any:
        if isinstance(value, str) and "," in value:
            return [part.strip() for part in value.split(",")]
        return value

    @field_validator("precision", mode="before")
    @classmethod
    def _precision_by_bits(cls, value: Any) -> Any:
        return {"bits": value} if isinstance(value, (str, int)) and not isinstance(value, bool) else value

    @field_validator("projections", mode="before")
    @classmethod
    def _projections_by_experts(cls, value: Any) -> Any:
        return {"experts": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_list(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(r"\d+(,\s*\d+)*", value):
            return [int(part) for part in value.split(",")]
        return value

    @field_validator("scale")
    @classmethod
    def _scale_is_positive(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 < value < math.inf:
            raise ValueError("a scale must be a positive number")
        return value

    @field_validator("max_shard_size")
    @classmethod
    def _size_is_readable(cls, value: str) -> str:
        parse_size(value)
        return value

    @model_validator(mode="after")
    def _top_k_fits(self) -> Recipe:
        # Without the key experts, the method's parameters may say how many there are; then prepare() checks this.
        if self.top_k > self.experts and "experts" in self.model_fields_set:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.experts} experts")
        return self

    def dump(self, keys: set[str] | None = None) -> str:
        """Return the recipe as YAML with all keys, or with those in ``keys``."""
        return dump_yaml(self.model_dump(include=keys))


def parse_size(text: str) -> int:
    """Return the bytes in ``5GB``, ``500MB``, ``1.5 GB`` or a plain number.

    Raises:
        ValueError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)?\s*", text.upper())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"'{text}' is not a size; write for example 500MB or 5GB")
    return int(float(match[1]) * _SIZES.get(match[2], 1))


def layer_selection(layers: str | list[int], count: int) -> tuple[int, ...]:
    """Return the layer numbers that the key ``layers`` stands for in a model of ``count`` layers, ascending.

    Raises:
        UsageError: the word is unknown, or the model has no such layer.
    """
    everything = tuple(range(count))
    if isinstance(layers, list):
        wrong = [layer for layer in layers if layer not in everything]
        if wrong or not layers:
            raise UsageError(
                f"layers: the model has layers 0 to {count - 1}, got {wrong or 'an empty list'}", hint="--layers all"
            )
        return tuple(sorted(set(layers)))
    word, _, number = layers.partition(":")
    named = {
        "all": everything,
        "even": everything[::2],
        "odd": everything[1::2],
        "every-other": everything[1::2],
        "last-half": everything[count - count // 2 :],
    }
    chosen = named.get(layers)
    if word in ("except-first", "except-last") and number.isdigit():
        n = int(number)
        chosen = everything[n:] if word == "except-first" else everything[: max(0, count - n)]
    if chosen:
        return chosen
    if chosen is not None:
        raise UsageError(f"layers: '{layers}' leaves none of the {count} layers", hint="--layers all")
    raise UsageError(
        f"layers: cannot read '{layers}'",
        hint="all, even, odd, every-other, last-half, except-first:N, except-last:N, or a list such as 0,2,4",
    )


def parse_recipe(content: Any, where: str) -> Recipe:
    """Validate a mapping, and return the recipe.

    Args:
        content: the mapping.
        where: what it comes from, for messages.

    Raises:
        UsageError: a key or value is wrong; the message names both.
    """
    return validated(Recipe, content, where)


def read_recipe(path: Path) -> dict[str, Any]:
    """Return a YAML recipe as a plain mapping that is not validated yet, so that options can override its keys.

    In a recipe from a model's folder, names are replaced by the paths that they stand for on this machine.

    Raises:
        UsageError: the file is missing or not YAML.
    """
    if not path.exists():
        raise UsageError(f"no such recipe: {path}", hint="upcycle list recipes shows the ones that come with upcycle")
    content = read_yaml(path, error=UsageError)
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys, got {type(content).__name__}")
    found: dict[str, Any] = here(path.parent, content)
    return found


def set_key(content: dict[str, Any], path: str, value: Any) -> None:
    """Set the key at the dotted ``path``; a short form such as ``router: zero`` becomes ``router: {name: zero}`` first.

    ``sources.0.text`` is a key of the first source.

    Raises:
        UsageError: there are not so many sources.
    """
    *parents, last = path.split(".")
    if parents[:1] == ["sources"] and len(parents) == 2:
        content, parents = _source_entry(content, parents[1]), []
    for parent in parents:
        inner = content.get(parent)
        if not isinstance(inner, dict):
            main = {"calibration": "text", "routing": "rule", "precision": "bits", "projections": "experts"}.get(
                parent, "name"
            )
            inner = {main: inner} if isinstance(inner, (str, int, list)) else {}
            content[parent] = inner
        content = inner
    content[last] = value


def _source_entry(content: dict[str, Any], number: str) -> dict[str, Any]:
    """Return the mapping of one of the sources, which are mappings afterwards."""
    named = content.get("sources") or []
    if isinstance(named, str):
        named = [part.strip() for part in named.split(",") if part.strip()]
    content["sources"] = [{"name": part} if isinstance(part, str) else part for part in named]
    if not number.isdigit() or int(number) >= len(named):
        raise UsageError(
            f"sources.{number}: there are {len(named)} sources" if named else f"sources.{number}: there are no sources",
            hint="name them first, with --sources; the first one is sources.0",
        )
    found: dict[str, Any] = content["sources"][int(number)]
    return found
