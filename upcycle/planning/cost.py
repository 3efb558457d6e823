"""What a conversion will cost, worked out from configurations and headers alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.checkpoints.checkpoint import COPY_BLOCK_BYTES
from upcycle.checkpoints.merged_checkpoint import SUM_BYTES
from upcycle.checkpoints.shard_writer import WAITING_BYTES
from upcycle.errors import EnvironmentFault
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.methods.base import PREFERRED_MULTIPLE
from upcycle.planning.expert_job import Job
from upcycle.planning.growth_job import GrowthJob
from upcycle.planning.job import AnyJob
from upcycle.planning.prepare import job_of
from upcycle.recipe.conversion_recipe import parse_recipe, parse_size
from upcycle.registry import load

CALIBRATION_BATCH_TOKENS = 4096
MOST_CACHE_BYTES = 1 << 30  # activations kept between the passes over a layer
REUSED_BYTES = 1 << 28  # freed memory that a calibration holds on to
# Resident set of the interpreter with a CPU build of torch loaded; measured, see tests/benchmarks.
_INTERPRETER_BYTES = 260_000_000
_STOCK_CLASSES = 260_000_000  # transformers' modelling code and what it imports: every conversion asks it first
_MALLOC_KEEPS = 1 << 26  # what glibc holds back from freed blocks, at most


@dataclass(frozen=True)
class Plan:
    """Everything the conversion will cost, and what it promises. ``as_dict`` has the documented JSON keys.

    ``sources`` is empty where there is one. ``kind`` is the method's; of a growth step ``summary`` says what becomes of what,
    and what is called dense is its source, a MoE or not.
    """

    sources: list[dict[str, Any]]
    family: str
    target: str
    method: str
    router: str
    calibration_tokens: int
    refit: str
    promise: str
    promise_reason: str
    parameters_dense: int
    parameters_total: int
    parameters_active: int
    bytes_dense: int
    bytes_output: int
    peak_memory_bytes: int
    flops_per_token_dense: int
    flops_per_token: int
    kind: str = "copies"
    summary: str = ""
    warnings: list[str] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return asdict(self)


def plan(source: str | None = None, **keys: Any) -> Plan:
    """Work out what a conversion would write and cost, without reading a weight.

    Args:
        source: local folder, hub id, ``.gguf`` file or ``demo``. Of a hub id only ``config.json`` is downloaded.
        **keys: recipe keys (:class:`upcycle.recipe.conversion_recipe.Recipe`).

    Raises:
        UpcycleError: whatever :func:`upcycle.convert` would refuse before reading weights.
    """
    content = {**keys, **({"source": source} if source else {})}
    return make_plan(job_of(parse_recipe(content, "recipe")))


def make_plan(job: AnyJob) -> Plan:
    """Work out the costs of a job."""
    return _growth_plan(job) if isinstance(job, GrowthJob) else _expert_plan(job)


def _expert_plan(job: Job) -> Plan:
    dense, shape, specs = job.dense, job.shape, job.dense_specs
    entries = [entry for unit in job.units for entry in unit.entries]
    used = job.family.all_stored_specs(dense)
    total = sum(entry.spec.elements for entry in entries)
    idle_per_layer = (shape.experts - shape.top_k) * 3 * shape.expert_size * dense.hidden_size
    active = total - idle_per_layer * len(shape.moe_layers)
    dense_total = sum(specs[name].elements for name in used)
    promise, why = job.promise
    undecided = job.method.undecided(job.recipe)
    sources = [{"name": s.name, "revision": s.revision, "weight": s.weight} for s in job.recipe.sources]
    return Plan(
        sources=sources,
        family=job.family.name,
        target=job.target.name,
        method=job.method.name,
        router=job.router_name,
        calibration_tokens=job.recipe.calibration.tokens if job.calibrated or undecided else 0,
        refit=job.refit,
        promise=promise,
        promise_reason=why,
        parameters_dense=dense_total,
        parameters_total=total,
        parameters_active=active,
        bytes_dense=sum(specs[name].nbytes for name in used),
        bytes_output=sum(shard.nbytes for shard in job.shards),
        peak_memory_bytes=_peak_memory(job),
        flops_per_token_dense=_flops(dense, dense_total),
        flops_per_token=_flops(job.target.stored(dense), active),
        kind=job.method.kind,
        warnings=[*_warnings(job, dense_total, active), *_file_warnings(job)],
        shards=_files(job),
    )


def _growth_plan(job: GrowthJob) -> Plan:
    grown, specs, recipe = job.grown, job.source.specs, job.recipe
    entries = [entry for unit in job.units for entry in unit.entries]
    stored = {entry.origin.name for entry in entries if entry.origin}
    before, after = (sum(specs[name].elements for name in stored), sum(entry.spec.elements for entry in entries))
    promise, why = grown.promise
    warnings = list(grown.warnings)
    if recipe.calibration.texts and not job.calibrated:
        warnings.append(f"calibration text is not used: {job.method.name} looks at none with these parameters")
    row = max(spec.nbytes // max(spec.shape[0], 1) for spec in specs.values() if spec.shape)
    copying = min(max(COPY_BLOCK_BYTES, row) + WAITING_BYTES, sum(shard.nbytes for shard in job.shards))
    looking = job.method.memory(job.source, recipe)
    embedding = 0 if grown.tied else grown.vocab_size * grown.hidden_size
    return Plan(
        sources=[{"name": s.name, "revision": s.revision, "weight": s.weight} for s in recipe.sources],
        family=job.family_name,
        target=job.family_name,
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
        peak_memory_bytes=_INTERPRETER_BYTES + _STOCK_CLASSES + max(copying, looking),
        flops_per_token_dense=2 * (before - grown.source_idle - embedding),
        flops_per_token=2 * (after - grown.idle - embedding),
        kind=job.method.kind,
        summary=grown.summary,
        warnings=[*warnings, *_file_warnings(job)],
        shards=_files(job),
    )


def _files(job: AnyJob) -> list[dict[str, Any]]:
    return [
        {"file": shard.file, "bytes": shard.nbytes, "units": [unit.name for unit in shard.units]}
        for shard in job.shards
    ]


def _file_warnings(job: AnyJob) -> list[str]:
    largest, wanted = max(shard.nbytes for shard in job.shards), parse_size(job.recipe.max_shard_size)
    if largest <= wanted:
        return []
    return [f"the largest file has {largest / 1e9:.1f} GB, above max_shard_size: a layer is never divided"]


def _flops(dense: DenseConfig, parameters: int) -> int:
    """Two per weight used in a matrix product. The embedding look-up is none; a tied one is used again as the head.

    Attention over the context is left out: it depends on the context and is the same before and after.
    """
    embedding = 0 if dense.tie_word_embeddings else dense.vocab_size * dense.hidden_size
    return 2 * (parameters - embedding)


def _peak_memory(job: Job) -> int:
    """The interpreter, one dense FFN as read, blocks waiting for the disk, and the largest piece built or copied at once."""
    d, size = job.dense.hidden_size, job.shape.expert_size
    ffn = job.family.ffn_specs(job.dense, job.shape.moe_layers[0]).values()
    item = TensorSpec((1,), job.dtype).nbytes
    read = sum(math.prod(shape) for shape in ffn) * item
    built = size * d * item * (2 if job.scale != 1 else 1)
    if job.method.draws:
        built += size * d * (item + 4 + 8)  # a copy, the normal numbers, and what they are measured by in fp64
    if job.recipe.dtype != "keep":
        stored = job.family.ffn_origins(job.dense, job.shape.moe_layers[0])["gate"].name
        read += max(math.prod(shape) for shape in ffn) * TensorSpec((1,), job.dense_specs[stored].dtype).nbytes
    if job.method.members:  # a matrix of the source at hand, and blocks that are averaged in fp64
        read += max(math.prod(shape) for shape in ffn) * item + 3 * SUM_BYTES
    largest_row_block = max(spec.nbytes // max(spec.shape[0], 1) for spec in job.dense_specs.values())
    blocks = max(built, COPY_BLOCK_BYTES, largest_row_block) + WAITING_BYTES + min(read, _MALLOC_KEEPS)
    writing = _INTERPRETER_BYTES + _STOCK_CLASSES + read + min(blocks, sum(shard.nbytes for shard in job.shards))
    return max(writing, _calibration_memory(job)) if job.calibrated or job.router.walks else writing


def _calibration_memory(job: Job) -> int:
    """One decoder layer in fp32, its FFN again as stored, the batch at hand and what a pass keeps, and the sums of a fit or
    of a comparison of neurons.
    """
    dense, layer = job.dense, job.shape.moe_layers[0]
    weights = sum(math.prod(shape) for shape in job.family.stored_specs(dense, layer).values())
    d, width = dense.hidden_size, dense.intermediate_size
    slots = 0 if job.method.members else (job.shape.experts + job.shape.shared) * job.shape.expert_size
    batch = CALIBRATION_BATCH_TOKENS * (6 * d + 4 * max(width, slots))
    kept = 0 if job.method.members else min(MOST_CACHE_BYTES // 4, job.recipe.calibration.tokens * (width + d))
    # fp64: sums of train and held-out tokens, their total, and what a solution takes: a copy, its factor, products.
    fit = 12 * slots * (slots + d) if job.refit == "down" else 2 * slots * d
    compared = 0
    if job.method.calibrated and job.method.members:
        # Two FFNs as stored and their gate and up in fp32, a second batch, the similarities, and their negatives in fp64.
        compared = 2 * (3 * TensorSpec((1,), job.dtype).nbytes + 2 * 4) * width * d
        compared += 4 * CALIBRATION_BATCH_TOKENS * (width + d) + (4 + 8) * width * width
    return (
        _INTERPRETER_BYTES
        + _STOCK_CLASSES
        + 4 * (2 * weights + batch + kept)
        + 8 * fit
        + compared
        + min(REUSED_BYTES, 4 * kept)
    )


def calibration_disk(job: AnyJob) -> int:
    """Bytes that a calibration keeps in the working folder: a few streams of states (of every source, where their neurons
    are compared), and refitted projections twice.
    """
    if isinstance(job, GrowthJob) or not (job.calibrated or job.sampled):
        return 0
    dense, shape = job.dense, job.shape
    walks = len({*job.method.members, *job.method.shared_members}) if job.method.calibrated else 0
    states = (8 + 4 * walks) * 4 * job.recipe.calibration.tokens * dense.hidden_size
    down = dense.hidden_size * (shape.experts + shape.shared) * shape.expert_size * TensorSpec((1,), job.dtype).nbytes
    return states + (2 * len(shape.moe_layers) * down if job.refit == "down" else 0)


def check_memory(job: Job) -> None:
    """Refuse a calibration that cannot fit into memory.

    Raises:
        EnvironmentFault: more is needed than is free.
    """
    from upcycle.hardware.memory import available_memory

    needed, free = _calibration_memory(job), available_memory()
    if needed > free:
        raise EnvironmentFault(
            f"calibration needs about {needed / 1e9:.1f} GB for one layer, and {free / 1e9:.1f} GB are free",
            hint="free some memory; --refit scale needs less than --refit down",
        )


def _warnings(job: Job, dense_parameters: int, active: int) -> list[str]:
    warnings = [job.note] if job.note else []
    shape = job.shape
    if active < 0.99 * dense_parameters and shape.top_k < shape.experts:
        warnings.append(
            f"only {active / dense_parameters:.0%} of the dense parameters are active per token: "
            "expect a drop in quality until the model is healed by continual pre-training"
        )
    running = (shape.top_k + shape.shared) * shape.expert_size / job.dense.intermediate_size
    if job.method.kind == "copies" and running > 1:
        same = "" if job.promise[0] == "approximate" else ", the same output until trained"
        what = f"{shape.top_k} copies" if running == shape.top_k else f"{running:.3g}x the neurons"
        if len(set(job.method.members)) > 1:
            what = f"{running:.3g} sources' worth"
        warnings.append(f"each token runs {what} of the FFN: {running:.3g}x its compute{same}")
    if job.method.undecided(job.recipe):
        warnings.append(
            f"which sources are merged is decided from their weights and the text: {shape.experts} experts are the most there can "
            "be; scoring holds one source or merge in fp32 if it fits"
        )
    elif job.recipe.calibration.texts and not job.calibrated:
        warnings.append(
            f"calibration text is not used: {job.method.name} with the {job.router_name} router looks at none"
        )
    padding = (shape.experts + shape.shared) * shape.expert_size - job.dense.intermediate_size
    if job.method.kind == "partition" and padding > 0:
        warnings.append(f"{padding} zero neurons per layer fill up experts of {shape.expert_size}")
    if shape.expert_size % PREFERRED_MULTIPLE:
        warnings.append(
            f"experts of {shape.expert_size} neurons are not a multiple of {PREFERRED_MULTIPLE}: transformers' default kernel "
            'refuses them (load with experts_implementation="eager", or use --pad)'
        )
    if job.target.stored(job.dense).windows != job.dense.windows:
        warnings.append(
            f"the sliding window of {job.dense.window} is never reached within {job.dense.max_position_embeddings} positions and is "
            f"left out: {job.target.name} has none"
        )
    (embeddings,) = next(job.units).entries
    if embeddings.origin and embeddings.origin.times != 1:
        able = [name for name in job.family.targets if Feature.MULTIPLIERS in load("target", name).holds]
        warnings.append(
            f"{job.target.name} multiplies no embeddings: they are written times {embeddings.origin.times:.4g} in float32, "
            f"{embeddings.spec.nbytes / 1e6:,.0f} MB" + (f" (--target {able[0]} does)" if able else "")
        )
    promise, why = job.promise
    if promise == "rounded":
        warnings.append(why)
    return warnings
