"""The recipe: everything that decides a conversion, validated before anything is read."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from upcycle.errors import UsageError
from upcycle.files.formats.parsing import dump_yaml, read_yaml
from upcycle.files.local_names import here
from upcycle.plugins import StrictSettings
from upcycle.registry import suggestion

_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class RouterRecipe(StrictSettings):
    """Which router initialiser, with its parameters."""

    name: str = Field(
        "auto",
        description="router initialiser, or auto: random for copies; zero, cool or (calibrated) ridge for splits",
    )
    parameters: dict[str, Any] = Field(default_factory=dict, description="the initialiser's own parameters")


class CalibrationRecipe(StrictSettings):
    """The text that calibrated methods, routers and refits look at."""

    text: str | list[str] | None = Field(
        None,
        description="calibration text: UTF-8 text, rows (.jsonl, .json, .csv, .parquet), hub datasets, demo; several are mixed evenly",
    )
    tokens: int = Field(65536, ge=16, description="calibration tokens")
    window: int = Field(512, ge=8, description="tokens per calibration window")
    mode: Literal["auto", "parallel", "sequential"] = Field(
        "auto", description="inputs from the dense model, or from the converted layers below (auto: for sparse splits)"
    )
    column: str = Field("text", description="column of a dataset or file of rows that holds the text")

    @field_validator("text", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) and "," in value else value

    @property
    def texts(self) -> list[str]:
        """The texts as a list; empty when there is no calibration."""
        return [self.text] if isinstance(self.text, str) else self.text or []


class SourceRecipe(StrictSettings):
    """One of several sources."""

    name: str = Field(description="local folder, hub id, or .gguf file")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="weight in the average of what is not an expert")
    positive_prompts: list[str] = Field(
        default_factory=list, description="what its expert is for (hidden, cheap_embed)"
    )
    negative_prompts: list[str] = Field(default_factory=list, description="what its expert is not for")
    text: str | list[str] | None = Field(None, description="UTF-8 sample texts of its domain (domain_ridge)")
    shared: bool = Field(False, description="its expert is always on beside the routed ones, at full weight")
    scale: float = Field(1.0, gt=0, allow_inf_nan=False, description="factor on what its expert adds")
    noise: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="standard deviation of normal noise on its expert's gate, up and down",
    )

    @property
    def role(self) -> str | None:
        """The first key by which its expert is not simply its FFN, routed; ``None`` where there is none."""
        usual = {"shared": False, "scale": 1.0, "noise": 0.0}
        return next((key for key, value in usual.items() if getattr(self, key) != value), None)

    @property
    def texts(self) -> list[str]:
        """The sample texts as a list."""
        return [self.text] if isinstance(self.text, str) else self.text or []


class VerificationRecipe(StrictSettings):
    """How the result is checked."""

    enabled: bool = Field(True, description="compare the result with the dense model after converting")
    text: str | None = Field(None, description="UTF-8 text file to check on; default: the embedded validation texts")
    tokens: int = Field(1024, ge=16, description="tokens to check on")


class Recipe(StrictSettings):
    """A conversion. The field order is the order in the written ``recipe.yaml``."""

    source: str = Field(
        description="local folder, hub id, .gguf file, or demo; of several sources the one whose config and tokenizer are taken"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    sources: list[SourceRecipe] = Field(
        default_factory=list,
        description="fine-tunes of one model, names or mappings: a mixing method makes experts of them; the first is the usual source",
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
        description="fraction of the FFN neurons that run per token, all layers together: sets experts, top_k and shared of a split",
    )
    pieces: int = Field(192, ge=4, description="with active: the most experts an FFN is cut into, shared ones included")
    shared_unheld: Literal["refuse", "route"] = Field(
        "refuse",
        description="where the target holds no shared experts: refuse, or make them routed ones (K grows by S)",
    )
    layers: str | list[int] = Field(
        "all",
        description="all, even (0, 2, ...), odd or every-other (1, 3, ...), last-half, except-first:N, except-last:N, or a list "
        "such as 0,2,4",
    )
    router: RouterRecipe = Field(default=RouterRecipe(), description="router initialiser")
    calibration: CalibrationRecipe = Field(default=CalibrationRecipe(), description="what calibrated parts look at")
    refit: Literal["auto", "down", "scale", "none"] = Field(
        "auto",
        description="closed-form fit to the dense output: down projections, a scale per layer, or none (auto: down if calibrated)",
    )
    scale: Literal["auto", "exact", "sum", "paper"] | float = Field(
        "auto",
        description="scale of the routed experts: exact, sum, paper, or a number (auto: sum when calibrated, else exact)",
    )
    pad: bool = Field(False, description="pad the FFN with zero neurons when the experts do not divide it (exact)")
    target: str = Field("auto", description="MoE architecture to write (upcycle list targets), or auto")
    layout: Literal["per-expert", "fused"] = Field(
        "per-expert", description="per-expert loads everywhere, fused is transformers 5's in-memory layout"
    )
    dtype: Literal["keep", "bfloat16", "float16", "float32"] = Field("keep", description="dtype of the written weights")
    max_shard_size: str = Field("5GB", description="largest weight file, e.g. 500MB or 5GB; a layer is never divided")
    tokenizer: Literal["copy", "none"] = Field("copy", description="copy the tokenizer, or none to go without")
    seed: int = Field(0, ge=0, description="seed of every random choice")
    verification: VerificationRecipe = Field(default=VerificationRecipe(), description="the check at the end")

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
        """Without a ``source`` the first of ``sources`` is the one, at its revision."""
        if not isinstance(content, dict) or content.get("source") or not content.get("sources"):
            return content
        named = cls._sources_by_name(content["sources"])
        first = named[0] if isinstance(named, list) and named else None
        if isinstance(first, SourceRecipe):
            first = first.model_dump()
        if not isinstance(first, dict) or not isinstance(first.get("name"), str):
            return {**content, "source": "?"}  # the check of sources, which fails, says what is wrong
        return {**content, "source": first["name"], "revision": first.get("revision")}

    @field_validator("router", mode="before")
    @classmethod
    def _router_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("calibration", mode="before")
    @classmethod
    def _calibration_by_text(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, (str, list)) else value

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
        # Where none are named, the method's parameters may say how many there are: prepare() looks again.
        if self.top_k > self.experts and "experts" in self.model_fields_set:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.experts} experts")
        return self

    def dump(self, keys: set[str] | None = None) -> str:
        """The resolved recipe as YAML, every key (or those of ``keys``) written out."""
        return dump_yaml(self.model_dump(include=keys))


def parse_size(text: str) -> int:
    """Bytes in ``5GB``, ``500MB``, ``1.5 GB`` or a plain number.

    Raises:
        ValueError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)?\s*", text.upper())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"'{text}' is not a size; write for example 500MB or 5GB")
    return int(float(match[1]) * _SIZES.get(match[2], 1))


def layer_selection(layers: str | list[int], count: int) -> tuple[int, ...]:
    """Turn the ``layers`` key into layer numbers.

    Raises:
        UsageError: an unknown word or a layer the model does not have.
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
    """Validate a mapping.

    Raises:
        UsageError: names the key path, the value and ``where`` it stands.
    """
    if not isinstance(content, dict):
        raise UsageError(f"{where}: a recipe is a mapping of keys, got {type(content).__name__}")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise explained(error, where) from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe as a plain mapping; flags are laid over it before validation. One that lies in a model's folder gets
    back the paths that its names stand for on this machine.

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
    """Lay ``value`` over the key at the dotted ``path``; ``router: zero`` becomes ``router: {name: zero}`` on the way."""
    *parents, last = path.split(".")
    for parent in parents:
        inner = content.get(parent)
        if not isinstance(inner, dict):
            main = "text" if parent == "calibration" else "name"
            inner = {main: inner} if isinstance(inner, (str, list)) else {}
            content[parent] = inner
        content = inner
    content[last] = value


def parse_parameters(model: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    """Validate a plug-in's own parameters.

    Raises:
        UsageError: an unknown parameter or a value of the wrong type.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explained(error, where, model) from None


def explained(error: ValidationError, where: str, model: type[BaseModel] = Recipe) -> UsageError:
    """What is wrong with a recipe of ``model``, as a message that names the key, and ``where`` it stands."""
    found = error.errors(include_url=False)
    first = next(
        (fault for fault in found if fault["type"] == "extra_forbidden"), found[0]
    )  # a misspelt key is missing, too
    path = [str(part) for part in first["loc"]]
    key, known = ".".join(path), _keys_at(model, path[:-1])
    if first["type"] == "extra_forbidden":
        hint = suggestion(path[-1], known) if known else f"{model.__name__} takes no parameters"
        return UsageError(f"{where}: unknown key '{key}'", hint=hint)
    if first["type"] == "missing":
        return UsageError(f"{where}: key '{key}' is missing", hint=f"add '{key}:' to the recipe")
    message = first["msg"].removeprefix("Value error, ")
    if not path:
        return UsageError(f"{where}: {message}")
    # A union reports the branch it tried as part of the path: keep what is a key.
    key = ".".join(part for i, part in enumerate(path) if part in _keys_at(model, path[:i]))
    field = model.model_fields.get(path[0])
    described = f"{path[0]}: {field.description}" if field and field.description else None
    got = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"  # a mapping is quoted by its own keys
    return UsageError(f"{where}: key '{key}': {message}{got}", hint=described)


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        if part.isdigit():  # one of a list, whose kind is known already
            continue
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        while get_args(inner) and get_origin(inner) is not dict:  # a list of them, or none
            inner = get_args(inner)[0]
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)
