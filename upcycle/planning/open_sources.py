"""Opens what a recipe converts: one checkpoint, several mixed, or several merged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from upcycle.architectures.described.auto_wrap import AUTO_WRAP, found_family
from upcycle.architectures.moe_families import moe_family
from upcycle.checkpoints.checkpoint import Checkpoint, DenseCheckpoint
from upcycle.checkpoints.find_family import Tried
from upcycle.checkpoints.licenses import license_record
from upcycle.checkpoints.merged_checkpoint import weighted_mean
from upcycle.checkpoints.mixed_checkpoint import Mix, MixedCheckpoint
from upcycle.errors import UsageError
from upcycle.files.formats.tensor_files import read_config
from upcycle.files.locate import locate
from upcycle.files.locate_adapted import is_local_adapted, names_adapter
from upcycle.methods.base import refuse_sources
from upcycle.methods.mixing.base import mixing

if TYPE_CHECKING:
    from upcycle.methods.base import AnyMethod
    from upcycle.methods.mixing.base import Merges, MixingMethod
    from upcycle.recipe.conversion_recipe import Recipe


def open_sources(recipe: Recipe, method: AnyMethod) -> Checkpoint:
    """Open the checkpoint that a recipe and its method convert: one model, or several behind the same interface.

    Raises:
        UpcycleError: a source cannot be opened, or the sources do not belong together.
    """
    if names_adapter(recipe.source) and not (recipe.sources and mixing(method)):
        raise UsageError(
            f"source: {recipe.source} is a LoRA adapter, and the model that is converted must be whole",
            hint="merge it first: upcycle merge ADAPTER OUT; only `sources` of mixing methods may be adapters",
        )
    if method.takes == "moe":
        if method.takes_sources:
            return _extended(recipe)
        from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint

        return MoeCheckpoint.open(recipe.source, recipe.revision)
    mixed = bool(recipe.sources)
    base = DenseCheckpoint.open(recipe.source, recipe.revision, tried(recipe), recipe.parts, adapters=mixed)
    if not recipe.sources:
        return base
    mixes = mixing(method) or refuse_sources(method, len(recipe.sources))
    members = [DenseCheckpoint.open(source.name, source.revision, adapters=True) for source in recipe.sources]
    return mix_sources(recipe, mixes, base, members)


def _extended(recipe: Recipe) -> Checkpoint:
    from upcycle.checkpoints.extended_moe import ExtendedMoe
    from upcycle.methods.growing.add_expert import fine_tune

    told = fine_tune(recipe)
    source = locate(recipe.source, recipe.revision)
    moe_family(read_config(source.path), source.name)  # said before the other model is opened
    added = DenseCheckpoint.open(told.name, told.revision)
    return ExtendedMoe(source, added, recipe.dtype, recipe.tokenizer == "copy")


def tried(recipe: Recipe) -> Tried | None:
    """Return what reads the configuration of a model that nobody described; None where the recipe does not ask for it.

    Raises:
        UsageError: the result is not to be verified, on which all depends there.
    """
    if recipe.family != AUTO_WRAP:
        return None
    if not recipe.verification.enabled:
        raise UsageError(
            f"family {AUTO_WRAP} finds FFNs by trying, and only the verification tells whether the result is the same model",
            hint="leave --no-verify out",
        )
    from upcycle.hardware.memory import available_memory
    from upcycle.models.model_inputs import ModelRun

    return lambda raw, where: found_family(
        raw, where, lambda model, ids: ModelRun(model).inputs(ids), available_memory()
    )


def mix_sources(
    recipe: Recipe, method: MixingMethod, base: DenseCheckpoint, sources: Sequence[DenseCheckpoint]
) -> MixedCheckpoint:
    """Return the opened sources as one checkpoint; where the method merges them, its merges take their place.

    Raises:
        UsageError: the sources do not belong together, or a merge has coefficients for another number of sources.
    """
    merges = method.merges
    weights, members = mixing_weights(recipe, merges), list(sources)
    if merges is not None:
        members = [weighted_mean(recipe, base, dict(zip(sources, row, strict=True))) for row in merges]
    mixed = MixedCheckpoint(
        base, members, weights, recipe.dtype, recipe.tokenizer == "copy", sources, method.experts_only
    )
    joined = method.joined(mixed.mix, recipe)
    return mixed.joining(joined.rest, joined.slerp)


def mixing_weights(recipe: Recipe, merges: Merges | None) -> list[float]:
    """Return the weight of every mixed model in the average of the tensors outside experts.

    A source weighs its ``weight``; a merge weighs the mean of its sources' weights, by its coefficients.

    Raises:
        UsageError: a merge has more or fewer coefficients than there are sources.
    """
    weights = [source.weight for source in recipe.sources]
    if merges is None:
        return weights
    for row in merges:
        if len(row) != len(weights):
            raise UsageError(
                f"parameters: 'coefficients' has a row of {len(row)} numbers, and there are {len(weights)} sources",
                hint="a row for every expert, with a number for every source",
            )
    return [math.fsum(c * w for c, w in zip(row, weights, strict=True)) / math.fsum(row) for row in merges]


def mix_of(checkpoint: Checkpoint) -> Mix | None:
    """Return the mix that a checkpoint holds; ``None`` for a single model."""
    return checkpoint.mix if isinstance(checkpoint, MixedCheckpoint) else None


def sources_record(checkpoint: Checkpoint, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the entries of ``sources`` in ``upcycle.json``, one per source; empty for a single model."""
    sources = getattr(checkpoint, "sources", ())
    return [
        {
            "name": member.source.name,
            "revision": member.source.revision,
            "weight": source.weight,
            "fingerprint": member.fingerprint,
            "license": license_record(member),
        }
        for member, source in zip(sources, recipe.sources if sources else (), strict=True)
    ]


def all_local(recipe: Recipe) -> bool:
    """Return whether every source of a recipe is on this machine, so that nothing is downloaded."""
    return all(is_local_adapted(name) for name in (recipe.source, *(source.name for source in recipe.sources)))
