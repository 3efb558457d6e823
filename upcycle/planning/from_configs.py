"""Describes a recipe's sources from their ``config.json`` alone, to plan conversions of models that are not downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.moe_families import moe_family
from upcycle.architectures.stock_classes import stock_shapes
from upcycle.checkpoints.compatibility import check_configs
from upcycle.checkpoints.find_family import Tried, family_of
from upcycle.checkpoints.mixed_checkpoint import Mix
from upcycle.files.formats.tensor_files import read_config
from upcycle.files.formats.tensor_names import refuse_said_quantized
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.files.locate_adapted import locate_adapted
from upcycle.methods.base import AnyMethod, refuse_sources
from upcycle.methods.growing.base import Described
from upcycle.methods.mixing.base import mixing
from upcycle.planning.open_sources import mixing_weights, tried
from upcycle.recipe.conversion_recipe import Recipe


class DenseDescribed(NamedTuple):
    """Describes a dense model that was not opened.

    Attributes:
        raw: its ``config.json``.
        family: its architecture.
        dense: the configuration that was read from ``raw``.
        specs: shape and dtype of every tensor that it must have.
        mix: the sources that are mixed; None: there is one.
    """

    raw: dict[str, Any]
    family: Family
    dense: DenseConfig
    specs: dict[str, TensorSpec]
    mix: Mix | None


def describe_dense(recipe: Recipe, method: AnyMethod) -> DenseDescribed:
    """Read the ``config.json`` of every source of a recipe, and no weights.

    Raises:
        UpcycleError: a source is not found or is not a dense model of a known family, or the sources do not belong together.
    """
    raw, family, dense = _config(recipe.source, recipe.revision, tried(recipe), recipe.parts)
    mix = None
    if recipe.sources:
        mixes = mixing(method) or refuse_sources(method, len(recipe.sources))
        for source in recipe.sources:
            _, _, other = _config(source.name, source.revision)
            check_configs(dense, other, recipe.source, source.name, family.aliases, mixes.experts_only)
        same = [i for i, s in enumerate(recipe.sources) if (s.name, s.revision) == (recipe.source, recipe.revision)]
        base = same[0] if same else len(recipe.sources)
        merges = mixes.merges
        if merges is not None:
            alone = [i for i, row in enumerate(merges) if base < len(row) and row[base] and sum(map(bool, row)) == 1]
            base = alone[0] if alone else len(merges)
        mix = Mix(tuple(mixing_weights(recipe, merges)), alike=False, base=base)
    return DenseDescribed(raw, family, dense, _specs(family.all_stored_specs(dense), dense.dtype), mix)


def describe_moe(recipe: Recipe, method: AnyMethod) -> Described:
    """Read the ``config.json`` of a recipe's source, a Mixture-of-Experts, and no weights; and that of a model added to it.

    Raises:
        UpcycleError: the source is not found, or is not a MoE of a known architecture.
    """
    raw = read_config(locate_adapted(recipe.source, recipe.revision, config_only=True).path)
    moe_family(raw, recipe.source)
    refuse_said_quantized(raw, recipe.source)
    added = None
    if method.takes_sources:
        from upcycle.methods.growing.add_expert import fine_tune

        told = fine_tune(recipe)
        other, family, dense = _config(told.name, told.revision)
        added = Described(other, _specs(family.all_stored_specs(dense), dense.dtype), told.name)
    return Described(raw, _specs(stock_shapes(raw), raw.get("dtype")), recipe.source, added=added)


def _specs(shapes: Mapping[str, tuple[int, ...]], dtype: str | None) -> dict[str, TensorSpec]:
    stored = dtype if dtype in ("float32", "float16") else "bfloat16"
    return {name: TensorSpec(shape, stored) for name, shape in shapes.items()}


def _config(
    name: str, revision: str | None, tried: Tried | None = None, parts: tuple[str, ...] = ()
) -> tuple[dict[str, Any], Family, DenseConfig]:
    raw = read_config(locate_adapted(name, revision, config_only=True).path)
    family = family_of(raw, name, tried, parts)
    refuse_said_quantized(raw, name)
    return raw, family, family.config(raw, f"{name}: config.json")
