"""The job that converts a dense model into experts: the recipe's parts, the shapes, the promise, and the cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.moe.base import Target
from upcycle.checkpoints.checkpoint import COPY_BLOCK_BYTES
from upcycle.checkpoints.merged_checkpoint import SUM_BYTES
from upcycle.checkpoints.output_layout import Shard, Unit
from upcycle.checkpoints.shard_writer import WAITING_BYTES
from upcycle.errors import EnvironmentFault
from upcycle.ffn.moe_shape import MoeShape
from upcycle.files.formats.tensor_files import widest
from upcycle.files.formats.tensor_spec import TensorSpec
from upcycle.hardware.memory import available_memory
from upcycle.methods.base import PREFERRED_MULTIPLE, Method
from upcycle.methods.mixing.base import MixingMethod, mixing
from upcycle.planning.cost import (
    CALIBRATION_BATCH_TOKENS,
    MOST_CACHE_BYTES,
    RESIDENT_BYTES,
    REUSED_BYTES,
    Plan,
    file_warnings,
    files_of,
    flops_of,
    is_power_of_two,
)
from upcycle.planning.own_text import own_text_bytes
from upcycle.planning.projections import (
    ImitatedProjection,
    imitation_bytes,
    imitation_memory,
    projection_facts,
    with_entries,
)
from upcycle.planning.routing_rule import routing_facts, why_unequal
from upcycle.planning.speed.predict import predicted_times
from upcycle.planning.split_sizes import least_width, widths
from upcycle.recipe.conversion_recipe import Recipe, RefitKind
from upcycle.routers.base import Router

_MALLOC_KEEPS = 1 << 26  # what glibc holds back from freed blocks, at most


@dataclass(frozen=True)
class ExpertJob:
    """Describes a validated conversion of a dense model into experts: its parts, its shapes, and the files to write."""

    recipe: Recipe
    dense: DenseConfig
    family: Family
    target: Target
    method: Method
    router: Router
    router_name: str
    shape: MoeShape
    scale: float
    refit: RefitKind
    shards: tuple[Shard, ...]
    dense_specs: Mapping[str, TensorSpec]
    targets: tuple[Target, ...] = ()  # all targets of the family, in the order in which they are tried
    note: str | None = None  # a remark of the source on how it is read, for the plan's warnings
    projections: tuple[ImitatedProjection, ...] = ()  # of attention, that become experts

    @property
    def units(self) -> Iterator[Unit]:
        """All units, in the order in which they are written."""
        return (unit for shard in self.shards for unit in shard.units)

    @property
    def calibrated(self) -> bool:
        """Whether layers are decided on calibration text."""
        return bool(self.recipe.calibration.texts) and looks_at_text(self.method, self.router)

    @property
    def undecided(self) -> bool:
        """Whether the method still has to find its coefficients from weights and text."""
        return self.mixing is not None and self.mixing.undecided(self.recipe)

    @property
    def mixing(self) -> MixingMethod | None:
        """The method, where it mixes several models; None where there is one source."""
        return mixing(self.method)

    @property
    def members(self) -> list[int]:
        """The indices of the sources whose FFN becomes a routed expert; the base's is their number. Empty for a single model."""
        return self.mixing.members if self.mixing else []

    @property
    def shared_members(self) -> list[int]:
        """The indices of the sources whose FFN becomes a shared expert."""
        return self.mixing.shared_members if self.mixing else []

    @property
    def sampled(self) -> bool:
        """Whether layers are decided on the prompts or texts that the recipe gives for each source."""
        return self.router.samples is not None

    @property
    def calibration_mode(self) -> Literal["parallel", "sequential"]:
        """The model whose states a layer is calibrated on: the dense one (parallel) or the converted one (sequential).

        Converted layers that equal the dense ones put out the same states, so that parallel is enough for them.
        """
        wanted = self.recipe.calibration.mode
        if self.method.kind == "copies" or self.projections:  # which imitate the dense model's on its own states
            return "parallel"
        if wanted != "auto":
            return wanted
        return "sequential" if self.promise[0] == "approximate" else "parallel"

    @property
    def dtype(self) -> str:
        """The dtype of the experts, which ``config.json`` names."""
        layers = self.shape.moe_layers if self.recipe.dtype == "keep" else self.shape.moe_layers[:1]
        return widest(self.family.ffn_dtype(self.dense, self.dense_specs, i, self.recipe.dtype) for i in layers)

    @property
    def promise(self) -> tuple[str, str]:
        """The promise, ``exact``, ``rounded`` or ``approximate``, and the reason for it.

        ``rounded``: exact except for a factor that the stored dtype cannot apply without rounding.
        """
        if self.projections:
            return "approximate", f"{len(self.projections)} projections of attention are imitated"
        if reason := why_unequal(self.method, self.shape, self.scale, self.router, self.target):
            return "approximate", reason
        if self.rounding:
            return "rounded", self.rounding
        return "exact", "the same function as the dense model"

    @property
    def family_name(self) -> str:
        """The dense architecture."""
        return self.family.name

    @property
    def context(self) -> int:
        """The longest input in tokens."""
        return self.target.stored(self.dense).max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """The vocabulary size of the dense model and the result."""
        return self.dense.vocab_size

    @property
    def config(self) -> dict[str, Any]:
        """The result's ``config.json``."""
        return with_entries(self.target.full_config(self.dense, self.shape, self.dtype), self.projections)

    @property
    def recipe_keys(self) -> set[str] | None:
        """The recipe keys that the conversion reads; None: all."""
        return None

    @property
    def recipe_text(self) -> str:
        """The resolved recipe as YAML, with the keys that the conversion reads."""
        return self.recipe.dump(self.recipe_keys)

    @property
    def record(self) -> dict[str, Any]:
        """The keys that only this kind of conversion adds to ``upcycle.json``."""
        return {
            "router": {"name": self.router_name, "title": self.router.title, "paper": self.router.paper},
            "routing": routing_facts(self.shape),
            "target": self.target.name,
            "scale": self.scale,
            "refit": self.refit,
            "moe_layers": list(self.shape.moe_layers),
            **projection_facts(self.projections),
            "layers": self.dense.num_hidden_layers,
        }

    @property
    def factors(self) -> tuple[float, ...]:
        """The factors of the routed experts' gate, up and down projections."""
        return tuple(self.scale**power for power in self.method.spread)

    @property
    def rounding(self) -> str | None:
        """What the stored dtype cannot hold without rounding, though method and router change nothing; None: nothing."""
        if self.dtype in ("float32", "float64"):
            return None
        own = map(self.mixing.source_scale, self.members + self.shared_members) if self.mixing else ()
        factor = next((f for f in (*self.factors, *own) if not is_power_of_two(f)), None)
        if factor is not None:
            return f"the factor {factor:g} rounds in {self.dtype}; --dtype float32 or a power of two is exact"
        what = self.target.folded(self.dense) or self.target.centred(self.dense)
        return (
            f"{what} are parts of the experts, which round in {self.dtype}; --dtype float32 is exact" if what else None
        )

    @property
    def working_bytes(self) -> int:
        """Bytes that a calibration keeps in the working folder.

        These are a few streams of states, once per source where the sources' neurons are compared, and refitted projections twice.
        """
        if not (self.calibrated or self.sampled):
            return 0
        dense, shape = self.dense, self.shape
        walks = len({*self.members, *self.shared_members}) if self.method.calibrated else 0
        states = (8 + 4 * walks) * 4 * self.recipe.calibration.tokens * dense.hidden_size
        item = TensorSpec((1,), self.dtype).nbytes
        down = dense.hidden_size * (shape.experts + shape.shared) * shape.expert_size * item
        fitted = {"down": 1, "blocks": 3}.get(self.refit, 0)
        return states + 2 * len(shape.moe_layers) * fitted * down + imitation_bytes(self.projections, self.recipe)

    def cost(self) -> Plan:
        """Work out what the conversion will write and need, from headers alone."""
        return _expert_plan(self)

    def check_memory(self) -> None:
        """Refuse a calibration that cannot fit into memory.

        Raises:
            EnvironmentFault: the calibration needs more memory than is free.
        """
        needed, free = calibration_memory(self), available_memory()
        if needed > free:
            raise EnvironmentFault(
                f"calibration needs about {needed / 1e9:.1f} GB for one layer, and {free / 1e9:.1f} GB are free",
                hint="free some memory; --refit none (of a split also scale) needs less than --refit down",
            )


def looks_at_text(method: Method, router: Router) -> bool:
    """Return whether a calibration text is read if the recipe has one.

    Splits always read it, for their refit; copies only if the method or the router is calibrated.
    """
    return method.kind != "copies" or method.calibrated or router.calibrated


def _expert_plan(job: ExpertJob) -> Plan:
    dense, shape, specs = job.dense, job.shape, job.dense_specs
    entries = [entry for unit in job.units for entry in unit.entries]
    used = job.family.all_stored_specs(dense)
    total = sum(entry.spec.elements for entry in entries)
    idle = (job.target.stored_width(shape.at(i)) * _per_neuron(job, dense.at(i)) for i in shape.moe_layers)
    active = total - round((shape.experts - shape.mean_active) * sum(idle))
    dense_total = sum(specs[name].elements for name in used)
    others = sum(specs[name].elements for name in job.family.tower_specs(dense))  # no token of text runs through them
    promise, why = job.promise
    undecided = job.undecided
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
        flops_per_token_dense=flops_of(dense, dense_total - others),
        flops_per_token=flops_of(job.target.stored(dense), active - others),
        kind=job.method.kind,
        warnings=[*_warnings(job, dense_total, active), *file_warnings(job.shards, job.recipe.max_shard_size)],
        shards=files_of(job.shards),
        time=None if job.method.kind == "copies" else predicted_times(dense, shape, job.target.name, job.dtype),
        routing=routing_facts(shape),
    )


def _per_neuron(job: ExpertJob, dense: DenseConfig) -> int:
    """Return the weights of a neuron of one layer, without biases; stock experts have a gate."""
    rows = len(dense.ffn_form.matrices) - 1 if job.target.keeps_names else 2
    return rows * dense.hidden_size + dense.ffn_output


def _peak_memory(job: ExpertJob) -> int:
    """Return the peak memory of a conversion in bytes.

    It is the sum of the interpreter, one dense FFN as stored, the blocks that wait for the disk, and the largest piece that is
    built or copied at once.
    """
    largest = max(job.shape.moe_layers, key=lambda i: job.shape.at(i).expert_size * job.dense.at(i).hidden_size)
    d, size = job.dense.at(largest).hidden_size, job.shape.at(largest).expert_size
    ffn = job.family.ffn_specs(job.dense, largest).values()
    item = TensorSpec((1,), job.dtype).nbytes
    read = sum(math.prod(shape) for shape in ffn) * item
    built = size * d * item * (2 if job.scale != 1 else 1)
    built *= 4 if job.target.keeps_names and job.dense.mlp_gated else 1  # gate, up, and both once more, alternating
    if job.method.draws:
        built += size * d * (item + 4 + 8)  # a copy, the normal draws, and an fp64 copy for their spread
    if job.recipe.dtype != "keep":
        stored = job.family.ffn_origins(job.dense, largest)["down"].name
        read += max(math.prod(shape) for shape in ffn) * TensorSpec((1,), job.dense_specs[stored].dtype).nbytes
    if job.members:  # a matrix of the source at hand, and blocks that are averaged in fp64
        read += max(math.prod(shape) for shape in ffn) * item + 3 * SUM_BYTES
    largest_row_block = max(spec.nbytes // max(*spec.shape[:1], 1, 1) for spec in job.dense_specs.values())
    blocks = max(built, COPY_BLOCK_BYTES, largest_row_block) + WAITING_BYTES + min(read, _MALLOC_KEEPS)
    writing = RESIDENT_BYTES + read + min(blocks, sum(shard.nbytes for shard in job.shards))
    if job.calibrated:  # an own text is written first, by the whole model
        weights = sum(spec.elements for spec in job.dense_specs.values())
        writing = max(writing, own_text_bytes(weights, vars(job.dense), job.recipe))
    return max(writing, calibration_memory(job)) if job.calibrated or job.router.walks else writing


def calibration_memory(job: ExpertJob) -> int:
    """Return the peak memory of a calibration in bytes.

    It holds one decoder layer in fp32 and its FFN again as stored, one batch, the activations that a pass keeps, and the sums
    of a fit or of a comparison of neurons.
    """
    dense, layer = job.dense, job.shape.moe_layers[0]
    weights = sum(math.prod(shape) for shape in job.family.stored_specs(dense, layer).values())
    d, width = dense.hidden_size, dense.intermediate_size
    neurons = 0 if job.members else (job.shape.experts + job.shape.shared) * job.shape.expert_size
    batch = CALIBRATION_BATCH_TOKENS * (6 * d + 4 * max(width, neurons))
    kept = 0 if job.members else min(MOST_CACHE_BYTES // 4, job.recipe.calibration.tokens * (width + d))
    # fp64: sums over fitted and over held-out tokens, their total, and the solver's copy, factor and products.
    fit = 12 * neurons * (neurons + d) if job.refit in ("down", "blocks") else 2 * neurons * d
    # fp32: gate, up and down, their gradients and two moments each; what a step keeps of its batch, a few values per neuron.
    trained = (12 * d + 8 * job.recipe.reconstruction.batch) * neurons if job.refit == "blocks" else 0
    compared = 0
    if job.method.calibrated and job.members:
        # Two FFNs as stored and their gate and up in fp32, a second batch, the similarities, and their negatives in fp64.
        compared = 2 * (3 * TensorSpec((1,), job.dtype).nbytes + 2 * 4) * width * d
        compared += 4 * CALIBRATION_BATCH_TOKENS * (width + d) + (4 + 8) * width * width
    return (
        RESIDENT_BYTES
        + 4 * (2 * weights + batch + kept + 8 * job.recipe.calibration.tokens * d * job.family.pauses)
        + max(8 * fit, 4 * trained, imitation_memory(job.projections, job.recipe))
        + compared
        + min(REUSED_BYTES, 4 * kept)
    )


def _warnings(job: ExpertJob, dense_parameters: int, active: int) -> list[str]:
    warnings = [job.note] if job.note else []
    shape, dense = job.shape, job.dense.at(job.shape.moe_layers[0])
    if active < 0.99 * dense_parameters and shape.mean_active < shape.experts:
        warnings.append(
            f"only {active / dense_parameters:.0%} of the dense parameters are active per token: "
            "expect a drop in quality until the model is healed by continual pre-training"
        )
    running = (shape.mean_active + shape.shared) * shape.expert_size / dense.intermediate_size
    if job.method.kind == "copies" and running > 1:
        same = "" if job.promise[0] == "approximate" else ", the same output until trained"
        matrices = len(shape.form.matrices) if job.target.keeps_names else 3  # stock experts have a gate
        compute = running * job.target.stored_width(shape) / shape.expert_size * matrices / len(shape.form.matrices)
        what = f"{running:g} copies" if running == shape.mean_active else f"{running:.3g}x the neurons"
        if len(set(job.members)) > 1:
            what = f"{running:.3g} sources' worth"
        warnings.append(f"each token runs {what} of the FFN: {compute:.3g}x its compute{same}")
    if job.undecided:
        warnings.append(
            f"which sources are merged is decided from their weights and the text: {shape.experts} experts are the most there can "
            "be; scoring holds one source or merge in fp32 if it fits"
        )
    elif job.recipe.calibration.texts and not job.calibrated:
        warnings.append(
            f"calibration text is not used: {job.method.name} with the {job.router_name} router looks at none"
        )
    padding = (shape.experts + shape.shared) * shape.expert_size - dense.intermediate_size
    if job.method.kind == "partition" and padding > 0:
        warnings.append(f"{padding} zero neurons per layer fill up experts of {shape.expert_size}")
    if shape.expert_size % PREFERRED_MULTIPLE:
        warnings.append(
            f"experts of {shape.expert_size} neurons are not a multiple of {PREFERRED_MULTIPLE}: transformers' default kernel "
            'refuses them (load with experts_implementation="eager", or use --pad)'
        )
    sparse = shape.top_k < shape.experts
    if job.method.kind == "partition" and sparse and shape.expert_size < least_width(dense.hidden_size):
        fitting = widths(dense.intermediate_size, dense.hidden_size)
        wider = fitting[0] if fitting and fitting[0] > shape.expert_size else least_width(dense.hidden_size)
        warnings.append(
            f"experts of {shape.expert_size} neurons are too narrow to be faster than the dense model in any engine: finding and "
            f"starting them takes longer than they save (--active with --width {wider}, or fewer experts)"
        )
    (embeddings,) = next(job.units).entries
    if embeddings.origin and embeddings.origin.times != 1:
        able = [target.name for target in job.targets if Feature.MULTIPLIERS in target.holds]
        warnings.append(
            f"{job.target.name} multiplies no embeddings: they are written times {embeddings.origin.times:.4g} in float32, "
            f"{embeddings.spec.nbytes / 1e6:,.0f} MB" + (f" (--target {able[0]} does)" if able else "")
        )
    rounded = [job.promise[1]] if job.promise[0] == "rounded" else []
    return [*warnings, *rounded, *job.target.remarks(job.dense)]
