"""Translates mergekit-moe's recipes, and tells the user what differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from upcycle.errors import UsageError
from upcycle.files.user_paths import user_path
from upcycle.plugins import StrictSettings
from upcycle.recipe.validated import validated

_ROUTERS: dict[str, dict[str, Any]] = {
    "hidden": {"name": "hidden", "parameters": {"tokens": "last"}},
    "hidden_last": {"name": "hidden", "parameters": {"tokens": "last"}},
    "hidden_avg": {"name": "hidden", "parameters": {"tokens": "mean"}},
    "cheap_embed": {"name": "cheap_embed"},
    "random": {"name": "random", "parameters": {"std": 1.0}},
    "uniform_random": {"name": "random", "parameters": {"distribution": "linear"}},
}
_DIFFERS = {
    "hidden": "hidden states of the prompts are taken after the norm before the FFN, where the router reads, and not at the layer's "
    "input; padding and special tokens are left out",
    "cheap_embed": "every prompt counts the same, whatever its length, and positive and negative prompts are subtracted without "
    "being normalized first",
    "random": "the random numbers differ (--seed)",
}
_TARGETS = {
    "mixtral": "mixtral",
    "qwen": "qwen2_moe",
    "qwen moe": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "qwen3 moe": "qwen3_moe",
}


class MergekitExpert(StrictSettings):
    """Validates one entry of ``experts`` or ``shared_experts``."""

    source_model: str = Field(description="folder or hub id, with @revision")
    positive_prompts: list[str] | None = Field(None, description="what the expert is for")
    negative_prompts: list[str] | None = Field(None, description="what it is not for")
    noise_scale: float | None = Field(None, ge=0, allow_inf_nan=False, description="noise on its weights")
    residual_scale: float | None = Field(None, gt=0, allow_inf_nan=False, description="factor on its output")


class MergekitRecipe(StrictSettings):
    """Validates a whole mergekit-moe recipe."""

    base_model: str = Field(description="folder or hub id, with @revision, of all but the experts")
    experts: list[MergekitExpert] = Field(min_length=1, description="the experts, in order")
    shared_experts: list[MergekitExpert] | None = Field(None, description="experts that are always on")
    gate_mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"] = Field(
        "hidden", description="how the router starts"
    )
    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(None, description="dtype to write")
    experts_per_token: int = Field(2, ge=1, description="top-k")
    architecture: str | None = Field(None, description="what to write")


def is_mergekit(content: Mapping[str, Any]) -> bool:
    """Return whether a mapping is a recipe of mergekit-moe: recipes of upcycle have no ``base_model`` and no list of experts."""
    return "base_model" in content or isinstance(content.get("experts"), list)


def translate(content: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Return the recipe that a mergekit-moe file stands for, and notes for the user on what it became and what differs.

    The recipe is ``branch_train_mix`` with ``rest=base``: experts are the FFNs of ``experts``, all else is ``base_model``'s.

    Args:
        content: the content of the file.
        where: the file, for messages.

    Raises:
        UsageError: a key is unknown or has no counterpart; the message names it.
    """
    recipe: MergekitRecipe = validated(MergekitRecipe, dict(content), f"{where} (mergekit-moe)")
    mode, shared = recipe.gate_mode, recipe.shared_experts or []
    architecture = (recipe.architecture or "").lower()
    if architecture and architecture not in _TARGETS:
        known = f"one of {', '.join(_TARGETS)}, or leave it out"
        raise _unmapped(where, "architecture", f"loading '{recipe.architecture}' would need code from outside", known)
    base, revision = _model(recipe.base_model, where, "base_model")
    found = {
        "source": base,
        "revision": revision,
        "sources": [
            *(_source(e, where) for e in recipe.experts),
            *({**_source(e, where), "shared": True} for e in shared),
        ],
        "method": "branch_train_mix",
        "parameters": {"rest": "base"},
        "top_k": recipe.experts_per_token,
        "router": _ROUTERS[mode],
        "dtype": recipe.dtype or "keep",
        "target": _TARGETS.get(architecture, "auto"),
    }
    notes = [
        f"{where} is a recipe of mergekit-moe: method branch_train_mix with rest=base, router {_ROUTERS[mode]['name']}, "
        f"{len(recipe.experts)} experts, top-{recipe.experts_per_token}"
        + (f", {len(shared)} shared" if shared else ""),
        f"gate_mode {mode}: {_DIFFERS[_ROUTERS[mode]['name']]}",
    ]
    if shared:
        notes.append(
            "shared_experts: always on at full weight, times residual_scale; mergekit multiplies them by the sigmoid of a gate made "
            "from their prompts, which upcycle does not use"
        )
    if any(expert.noise_scale for expert in (*recipe.experts, *shared)):
        notes.append("noise_scale: the noise is as large as mergekit's, but the random numbers differ (--seed)")
    return found, notes


def _source(expert: MergekitExpert, where: str) -> dict[str, Any]:
    name, revision = _model(expert.source_model, where, "source_model")
    return {
        "name": name,
        "revision": revision,
        "positive_prompts": expert.positive_prompts or [],
        "negative_prompts": expert.negative_prompts or [],
        "scale": 1.0 if expert.residual_scale is None else expert.residual_scale,
        "noise": expert.noise_scale or 0.0,
    }


def _model(name: str, where: str, key: str) -> tuple[str, str | None]:
    """Return a folder or hub id and its revision."""
    if user_path(name).exists():
        return name, None
    model, _, adapter = name.partition("+")
    if adapter and key != "source_model":
        raise _unmapped(
            where, key, f"'{name}' adds an adapter", "merge it first, and name OUT: upcycle merge ADAPTER OUT"
        )
    if "@" in adapter:
        raise _unmapped(where, key, f"'{name}' names a revision of an adapter", "download it, and name its folder")
    model, _, revision = model.partition("@")
    return f"{model}+{adapter}" if adapter else model, revision or None


def _unmapped(where: str, key: str, why: str, hint: str) -> UsageError:
    return UsageError(f"{where} (mergekit-moe): key '{key}' has no counterpart: {why}", hint=f"{key}: {hint}")
