"""The job that grows a model: every tensor of the result with its origin and its file, and the cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from upcycle.architectures.dense.narrowed import MadeTensor
from upcycle.architectures.dense.widened import GrownTensor
from upcycle.architectures.expert_terms import DenseMatrix, ExpertTerms, FactorRows, PackedMatrix
from upcycle.architectures.stored_moe import ExpertRows
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.checkpoint import COPY_BLOCK_BYTES
from upcycle.checkpoints.output_layout import OutputEntry, Shard, Unit, shards_of
from upcycle.checkpoints.shard_writer import WAITING_BYTES
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.files.names import DECISION_FILE
from upcycle.methods.base import AnyMethod
from upcycle.methods.growing.base import Described, Grown, Growth, Piece
from upcycle.methods.mixing.base import mixing
from upcycle.planning.cost import RESIDENT_BYTES, Plan, file_warnings, files_of
from upcycle.planning.job import CALIBRATION_HINT, check_tokenizer
from upcycle.planning.own_text import check_own_text, own_text_bytes
from upcycle.planning.precision.entries import weights_in
from upcycle.recipe.conversion_recipe import Recipe, parse_size

if TYPE_CHECKING:
    import torch

    from upcycle.checkpoints.checkpoint import Checkpoint
    from upcycle.checkpoints.mixed_checkpoint import Mix
    from upcycle.progress import Progress

_KEYS = {"source", "revision", "method", "parameters", "max_shard_size", "tokenizer", "seed", "verification"}


@dataclass(frozen=True)
class GrowthJob:
    """Describes a validated growth step, which copies whole tensors."""

    recipe: Recipe
    method: Growth
    source: Described
    grown: Grown
    shards: tuple[Shard, ...]

    @property
    def units(self) -> Iterator[Unit]:
        """All units, in the order in which they are written."""
        return (unit for shard in self.shards for unit in shard.units)

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is read."""
        return self.method.text_for is not None or self.undecided

    @property
    def undecided(self) -> bool:
        """Whether the method still has to find its coefficients from weights and text."""
        mixes = mixing(self.method)
        return mixes is not None and mixes.undecided(self.recipe)

    @property
    def promise(self) -> tuple[str, str]:
        """The promise, ``exact`` or ``approximate``, and the reason for it."""
        return self.grown.promise

    @property
    def family_name(self) -> str:
        """The architecture of the source."""
        return str(self.source.raw["model_type"])

    @property
    def target_name(self) -> str:
        """The architecture of the result."""
        return str(self.grown.config["model_type"])

    @property
    def context(self) -> int:
        """The longest input in tokens."""
        return self.grown.context

    @property
    def vocab_size(self) -> int:
        """The vocabulary size of source and result."""
        return self.grown.vocab_size

    @property
    def config(self) -> dict[str, Any]:
        """The result's ``config.json``."""
        config = dict(self.grown.config)
        if self.recipe.dtype != "keep":
            config.pop("torch_dtype", None)
            config["dtype"] = self.recipe.dtype
        return config

    @property
    def recipe_text(self) -> str:
        """The resolved recipe as YAML, with only the keys that the step reads."""
        return self.recipe.dump(known_keys(self.method))

    @property
    def record(self) -> dict[str, Any]:
        """The keys that only this kind of conversion adds to ``upcycle.json``."""
        return {"target": self.target_name, "growth": self.grown.summary}

    @property
    def working_bytes(self) -> int:
        """Bytes that the working folder needs in addition to the output: 0, as a decision is a few numbers."""
        return 0

    def cost(self) -> Plan:
        """Work out what the step will write and need, from headers alone."""
        return _growth_plan(self)


G = TypeVar("G", bound=GrowthJob)


def known_keys(method: Growth) -> set[str]:
    """Return the recipe keys that a growth step reads."""
    return _KEYS | method.keys | ({"sources"} if method.takes_sources else set())


def _checked(recipe: Recipe, method: AnyMethod, mix: Mix | None) -> Growth:
    """Return the recipe's growth step with its sources.

    Raises:
        UsageError: the recipe sets a key that the step does not read, or lacks the text that it needs.
    """
    method = method.joined(mix, recipe)
    assert isinstance(method, Growth)
    known = known_keys(method)
    if meaningless := sorted(recipe.model_fields_set - known):
        does = {
            "compression": "compresses a Mixture-of-Experts",
            "narrowing": "makes a dense model narrower",
            "beside": "puts experts beside FFNs",
        }.get(method.kind, "copies whole tensors")
        raise UsageError(
            f"{method.name} {does}, and does not read the key '{meaningless[0]}'",
            hint=f"leave it out; it reads {', '.join(sorted(known - {'source', 'method'}))}",
        )
    if method.text_for and not recipe.calibration.texts:
        raise UsageError(f"{method.text_for} looks at text and needs some", hint=CALIBRATION_HINT)
    return method


def prepare_growth(
    kind: type[G],
    recipe: Recipe,
    method: AnyMethod,
    source: Described,
    has_tokenizer: bool = True,
    mix: Mix | None = None,
) -> G:
    """Work out every output tensor of a growth step. No argument is changed.

    Args:
        kind: the class of the job to return.
        recipe: the user's recipe.
        method: the recipe's method, without the sources.
        source: the model that grows.
        has_tokenizer: whether a tokenizer lies beside it.
        mix: the sources, where there are several.

    Raises:
        UsageError: the recipe cannot be carried out on this model.
        RefusalError: the step does not take this model.
    """
    check_tokenizer(recipe, has_tokenizer)
    if method.takes == "dense":  # a MoE writes text for its own experts, whatever is added to them
        check_own_text(recipe)
    step = _checked(recipe, method, mix)
    grown = step.grow(source, recipe)
    recipe = recipe.model_copy(update=dict(grown.resolved))
    return kind(recipe, step, source, grown, shards_of_grown(recipe, source, grown))


def shards_of_grown(recipe: Recipe, source: Described, grown: Grown) -> tuple[Shard, ...]:
    """Return the files of the result of a growth step."""
    units = [Unit(piece.name, piece.layer, _entries(piece, recipe, source.specs)) for piece in grown.pieces]
    return shards_of(units, parse_size(recipe.max_shard_size))


def _growth_plan(job: GrowthJob) -> Plan:
    grown, specs, recipe = job.grown, job.source.specs, job.recipe
    entries = [entry for unit in job.units for entry in unit.entries]
    stored = {entry.origin.name for entry in entries if entry.origin}
    before, after = (sum(specs[name].elements for name in stored), sum(map(weights_in, entries)))
    promise, why = grown.promise
    warnings = list(grown.warnings)
    if recipe.calibration.texts and not job.calibrated:
        warnings.append(f"calibration text is not used: {job.method.name} looks at none with these parameters")
    row = max(spec.nbytes // max(spec.shape[0], 1) for spec in specs.values() if spec.shape)
    copying = min(max(COPY_BLOCK_BYTES, row) + WAITING_BYTES, sum(shard.nbytes for shard in job.shards))
    made = [entry.spec.nbytes for entry in entries if isinstance(entry.origin, GrownTensor)]
    copying += 3 * max(made, default=0)  # it is drawn in fp32, and written as it is stored
    looking = job.method.memory(job.source, recipe)
    weights = sum(spec.elements for spec in specs.values())
    writing = own_text_bytes(weights, job.source.raw, recipe) if job.calibrated else 0
    embedding = 0 if grown.tied else grown.vocab_size * grown.hidden_size
    return Plan(
        sources=[{"name": s.name, "revision": s.revision, "weight": s.weight} for s in recipe.sources],
        family=job.family_name,
        target=job.target_name,
        method=job.method.name,
        router="none",
        calibration_tokens=recipe.calibration.tokens if job.calibrated else 0,
        refit="none",
        promise=promise,
        promise_reason=why,
        parameters_dense=before,
        parameters_total=after,
        parameters_active=after - grown.idle,
        bytes_dense=sum(specs[name].nbytes for name in stored),
        bytes_output=sum(shard.nbytes for shard in job.shards),
        peak_memory_bytes=max(RESIDENT_BYTES + max(copying, looking), writing),
        flops_per_token_dense=2 * (before - grown.source_idle - embedding),
        flops_per_token=2 * (after - grown.idle - embedding),
        kind=job.method.kind,
        summary=grown.summary,
        warnings=[*warnings, *file_warnings(job.shards, job.recipe.max_shard_size)],
        shards=files_of(job.shards),
    )


def _entries(piece: Piece, recipe: Recipe, specs: Mapping[str, TensorSpec]) -> tuple[OutputEntry, ...]:
    def spec(origin: Origin) -> TensorSpec:
        stored = specs[origin.name]
        shape = origin.shape(_hidden(origin, stored)) if isinstance(origin, DenseMatrix) else _shape(origin, stored)
        return TensorSpec(shape, origin.dtype(stored.dtype if recipe.dtype == "keep" else recipe.dtype))

    return tuple(OutputEntry(name, spec(origin), origin) for name, origin in piece.tensors.items())


def _hidden(origin: DenseMatrix, stored: TensorSpec) -> int:
    """Return the hidden size, given a stored tensor of experts."""
    shape = origin.source.plain_shape(tuple(stored.shape))
    return shape[-2] if origin.part == "down" else shape[-1]


def _shape(origin: Origin, stored: TensorSpec) -> tuple[int, ...]:
    """Return the shape of an output tensor: one that holds several experts has as many as its origin names."""
    if isinstance(origin, ExpertRows | ExpertTerms):
        return origin.shape(tuple(stored.shape))
    if isinstance(origin, PackedMatrix | FactorRows):
        return origin.sizes
    if isinstance(origin, MadeTensor):
        return origin.shape
    if origin.filled is not None:
        return origin.filled[0]
    return tuple(stored.shape) if origin.rows is None else (origin.rows[1], *stored.shape[1:])


def decide_growth(
    job: G, checkpoint: Checkpoint, windows: torch.Tensor | None, folder: Path, progress: Progress
) -> tuple[G, dict[str, Any] | None]:
    """Decide what depends on weights and text.

    The decision is written to ``folder``; one that an earlier run wrote there is kept.

    Args:
        job: the growth step.
        checkpoint: its source.
        windows: the text, token ids ``[N, W]``; None: the step reads none.
        folder: where the decision is kept.
        progress: where to report.

    Returns:
        The job with its decision, and what ``upcycle.json`` says of the text (None: none was read).
    """
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint

    path = folder / DECISION_FILE
    if not path.exists():
        measured: dict[str, Any] = {}
        if isinstance(checkpoint, MoeCheckpoint) and (
            found := job.method.choose(checkpoint, job.recipe, windows, progress)
        ):
            choice, measured = found
            job = _chosen(job, choice)
        write_decision(folder, {**job.grown.made, **measured})
    if windows is None:
        return decided_growth(job, folder), None
    from upcycle.text.text_record import text_record

    return decided_growth(job, folder), text_record(job.recipe, windows)


def write_decision(folder: Path, content: dict[str, Any]) -> None:
    """Write what was decided; the file appears complete or not at all."""
    path = folder / DECISION_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    temporary.rename(path)


def decided_growth(job: G, folder: Path) -> G:
    """Return the job with the decision that is written in ``folder``."""
    found = read_json(folder / DECISION_FILE).get(job.method.decides)
    return job if found is None else _chosen(job, {int(layer): tuple(each) for layer, each in found.items()})


def _chosen(job: G, choice: Mapping[int, tuple[Any, ...]]) -> G:
    grown = job.method.grow(job.source, job.recipe, choice)
    return replace(job, grown=grown, shards=shards_of_grown(job.recipe, job.source, grown))


def growth_reports(folder: Path) -> list[dict[str, Any]]:
    """Return, for every layer, the decision and the numbers behind it; empty where nothing was decided."""
    content = read_json(folder / DECISION_FILE)
    utility = content.get("utility", {})
    return [
        {"layer": int(layer), "experts": taken, "utility": utility.get(layer)}
        for layer, taken in content.get("experts", {}).items()
    ]
