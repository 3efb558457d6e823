"""Makes the job of a recipe: from a checkpoint, or from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.stored_moe import moe_family
from upcycle.checkpoints.checkpoint import Checkpoint, DenseCheckpoint
from upcycle.checkpoints.compatibility import check_configs
from upcycle.checkpoints.find_family import family_of
from upcycle.checkpoints.mixed_checkpoint import Mix, MixedCheckpoint
from upcycle.files.formats.tensor_files import read_config
from upcycle.files.formats.tensor_names import refuse_said_quantized
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.files.locate import locate
from upcycle.methods.growing.base import Described
from upcycle.planning.expert_job import method_of, prepare
from upcycle.planning.growth_job import prepare_growth
from upcycle.planning.job import AnyJob
from upcycle.planning.open_sources import all_local, mix_of, mixing_weights, open_sources, takes_moe
from upcycle.recipe.conversion_recipe import Recipe
from upcycle.registry import load


def job_of(recipe: Recipe) -> AnyJob:
    """The job of a recipe, from local checkpoints' headers or hub repositories' ``config.json``.

    Stock transformers is asked whether it takes the sources and the result, as before a conversion; of a repository of the hub
    there is ``config.json`` alone to ask about.
    """
    from upcycle.planning.loadable import check_config, check_loadable

    if all_local(recipe):
        checkpoint = open_sources(recipe)
        job = job_for(recipe, checkpoint)
        check_loadable(job, checkpoint)
        return job
    job = _job_from_configs(recipe)
    check_config(job.config, "the result")
    return job


def _job_from_configs(recipe: Recipe) -> AnyJob:
    if takes_moe(recipe.method):
        from upcycle.architectures.stock_classes import stock_shapes

        raw = read_config(locate(recipe.source, recipe.revision, config_only=True).path)
        moe_family(raw, recipe.source)
        refuse_said_quantized(raw, recipe.source)
        return prepare_growth(recipe, Described(raw, _specs(stock_shapes(raw), raw.get("dtype")), recipe.source))
    raw, family, dense = _config(recipe.source, recipe.revision)
    mix = None
    if recipe.sources:
        for source in recipe.sources:
            _, _, other = _config(source.name, source.revision)
            check_configs(dense, other, recipe.source, source.name, family.aliases, method_of(recipe).experts_only)
        same = [i for i, s in enumerate(recipe.sources) if (s.name, s.revision) == (recipe.source, recipe.revision)]
        base = same[0] if same else len(recipe.sources)
        merges = method_of(recipe).merges
        if merges is not None:
            alone = [i for i, row in enumerate(merges) if base < len(row) and row[base] and sum(map(bool, row)) == 1]
            base = alone[0] if alone else len(merges)
        mix = Mix(tuple(mixing_weights(recipe, merges)), alike=False, base=base)
    specs = _specs(family.all_stored_specs(dense), dense.dtype)
    if grows(recipe):
        return prepare_growth(recipe, Described(raw, specs, recipe.source), mix=mix)
    return prepare(recipe, family, dense, specs, mix=mix)


def _specs(shapes: Mapping[str, tuple[int, ...]], dtype: str | None) -> dict[str, TensorSpec]:
    stored = dtype if dtype in ("float32", "float16") else "bfloat16"
    return {name: TensorSpec(shape, stored) for name, shape in shapes.items()}


def grows(recipe: Recipe) -> bool:
    """Whether the recipe's method is a growth step."""
    return bool(load("method", recipe.method).kind == "growth")


def job_for(recipe: Recipe, checkpoint: Checkpoint) -> AnyJob:
    """The job of a recipe on an opened checkpoint, which is told how what is no expert is joined."""
    specs, mix = checkpoint.store.specs, mix_of(checkpoint)
    job: AnyJob
    if grows(recipe):
        described = Described(checkpoint.raw_config, specs, checkpoint.source.name)
        job = prepare_growth(recipe, described, checkpoint.has_tokenizer, mix)
    else:
        assert isinstance(checkpoint, DenseCheckpoint)
        job = prepare(recipe, checkpoint.family, checkpoint.config, specs, checkpoint.has_tokenizer, mix)
        job = replace(job, note=checkpoint.note if recipe.dtype == "keep" else None)
    if isinstance(checkpoint, MixedCheckpoint):
        checkpoint.rest, checkpoint.slerp = job.method.rest, job.method.slerp
    return job


def _config(name: str, revision: str | None) -> tuple[dict[str, Any], Family, DenseConfig]:

    raw = read_config(locate(name, revision, config_only=True).path)
    family = family_of(raw, name)
    refuse_said_quantized(raw, name)
    return raw, family, family.config(raw, f"{name}: config.json")
