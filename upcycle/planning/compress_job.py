"""The job that compresses a Mixture-of-Experts: every tensor of the result with its origin, and the cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import RefusalError, UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.user_paths import user_path
from upcycle.methods.compressing.base import WRAPPED, Compression
from upcycle.methods.compressing.described_cuts import Cut, cut_of, described_cut
from upcycle.methods.compressing.observations import MOST_GRAM, MOST_OUTPUTS, MOST_STREAMS, Observations
from upcycle.planning.cost import RESIDENT_BYTES, Plan
from upcycle.planning.growth_job import GrowthJob, shards_of_grown
from upcycle.planning.job import check_text
from upcycle.planning.precision.entries import in_bits
from upcycle.planning.precision.scheme import Scheme, scheme_of
from upcycle.recipe.conversion_recipe import parse_size
from upcycle.recipe.precision_recipe import FP8_BITS, PrecisionRecipe

CUTS_FILE = "compression.json"
_WALKED = 4096  # tokens that run at once
_STATES = (
    12  # streams of them that a layer holds at once: queries, keys, values, outputs, routers and what is made of them
)


@dataclass(frozen=True)
class CompressJob(GrowthJob):
    """Describes a validated compression of a MoE."""

    scheme: Scheme | None = None  # how weights are stored; None: in full precision

    @property
    def compression(self) -> Compression:
        """The method."""
        assert isinstance(self.method, Compression)
        return self.method

    @cached_property
    def moe(self) -> MoeModel:
        """The source."""
        return MoeModel.read(self.source.raw, self.source.specs, self.source.where)

    @cached_property
    def keep(self) -> int:
        """How much is kept of what the method cuts, such as experts per layer."""
        return self.compression.kept(self.moe, self.recipe)

    @cached_property
    def changes(self) -> bool:
        """Whether anything is cut."""
        return self.compression.changed(self.moe, self.keep)

    @property
    def wraps(self) -> bool:
        """Whether the result is ``upcycle_moe``."""
        return self.target_name == WRAPPED

    @cached_property
    def refits(self) -> bool:
        """Whether what is left is refitted on text."""
        return self.recipe.refit != "none" and self.changes and self.compression.refits

    @property
    def refit(self) -> str:
        """What is refitted: ``down``, ``blocks`` (all of the experts and the router, or of the FFN) or ``none``."""
        if not self.refits:
            return "none"
        return "blocks" if self.recipe.refit == "blocks" else "down"

    @cached_property
    def refitted_parts(self) -> tuple[str, ...]:
        """Which tensors are refitted, by what they hold."""
        if not self.refits:
            return ()
        experts = ("gate", "up", "gate_up", "down")
        if self.refit == "blocks":
            return (*experts, "router")
        return experts if self.compression.ternary else ("down",)

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is read."""
        observes = self.compression.observes and self.recipe.observations is None
        reads = self.compression.tries or bool(self.compression.makes)
        return self.recipe.precision.looks or (self.changes and (observes or self.refits or reads))

    @cached_property
    def about(self) -> dict[str, Any] | None:
        """What the file of observations says of itself; None: the recipe names none."""
        return None if self.recipe.observations is None else Observations.about(user_path(self.recipe.observations))

    @property
    def undecided(self) -> bool:
        """Nothing is decided before the sources are opened."""
        return False

    @property
    def record(self) -> dict[str, Any]:
        """The keys that only this kind of conversion adds to ``upcycle.json``."""
        bits = {} if self.scheme is None else {"precision": self.recipe.precision.model_dump()}
        return {
            "target": self.target_name,
            "compression": self.grown.summary,
            "refit": self.refit,
            **bits,
        }

    def cost(self) -> Plan:
        """Work out what the compression will write and need, from headers alone."""
        plan, moe = super().cost(), self.moe
        stored = [self.source.specs[name] for names in moe.names.values() for name in names]
        before = sum(spec.elements for spec in stored)
        embedding = 0 if self.grown.tied else moe.vocab_size * moe.hidden_size
        layers = [
            sum(self.source.specs[name].elements for name in names)
            for layer, names in moe.names.items()
            if layer is not None
        ]
        outside = sum(self.source.specs[name].elements for name in moe.names[None])
        # Two models' streams and layers; where layers are trained, their inputs and targets, gradients and moments.
        held, copies = {"none": (0, 0), "down": (3, 2), "blocks": (5, 5)}[self.refit]
        if self.compression.makes:
            held, copies = max(held, 1), max(copies, 1)
        if self.compression.tries:  # two models are walked side by side
            held, copies = max(held, 3), max(copies, 2)
        stream = plan.calibration_tokens * moe.hidden_size
        walking = 4 * (copies * max(layers) + outside + 2 * held * stream) if self.calibrated and copies else 0
        if self.calibrated and self.compression.observes and self.recipe.observations is None:
            walking = max(walking, 4 * observing(moe, max(layers), stream))
        if self.scheme is not None:
            # A layer as it was and as it is cut, its rounded matrices, and a batch of the stream.
            walking = max(walking, 4 * (3 * max(layers) + outside + 3 * plan.calibration_tokens * moe.hidden_size))
        return replace(
            plan,
            parameters_dense=before,
            bytes_dense=sum(spec.nbytes for spec in stored),
            flops_per_token_dense=2 * (before - self.grown.source_idle - embedding),
            refit=self.refit,
            warnings=[*plan.warnings, *self._one_kind()],
            peak_memory_bytes=max(plan.peak_memory_bytes, RESIDENT_BYTES + walking),
        )

    def _one_kind(self) -> list[str]:
        """Return the warning that the text is of one kind."""
        texts = self.recipe.calibration.texts if self.about is None else self.about["text"].get("text") or []
        if not self.changes or not self.compression.looks or len(texts) != 1 or texts[0] == "demo":
            return []
        return [
            f"one text alone ({texts[0]}) decides which experts stay: those of other kinds of text go (chosen on C4 alone, cuts by a "
            "quarter to a half left 35 of 70 points in what models write, while multiple choice stayed at 69); name texts of all "
            "kinds that matter: --calibration docs.txt,code.txt,chat.txt"
        ]


def observing(moe: MoeModel, layer: int, stream: int) -> int:
    """Return how many fp32 numbers are in memory at most while experts are observed, which stay in their files.

    Args:
        moe: the model.
        layer: the numbers in its largest layer.
        stream: those in the stream of all tokens.
    """
    expert = moe.expert_elements // len(moe.moe_layers) // moe.experts
    batch = min(stream, _WALKED * moe.hidden_size)
    outputs = min(MOST_OUTPUTS, moe.experts * batch)
    kept = min(MOST_STREAMS, (moe.layers + 1) * stream) + 2 * min(MOST_GRAM, moe.experts * moe.hidden_size**2)
    walked = layer - moe.experts * expert + 3 * expert + outputs + kept + _STATES * batch
    return stream + max(moe.vocab_size * moe.hidden_size, walked)


C = TypeVar("C", bound=CompressJob)


def checked_compression(job: C) -> C:
    """Return the job itself, if its recipe can be carried out.

    Raises:
        UsageError: text is missing, or a refit is asked for that there is none of.
    """
    recipe = job.recipe
    if recipe.observations is not None:
        Observations.about(user_path(recipe.observations))  # a file that is not there, or another one, is refused now
    made = job.compression
    alike = not (made.ternary or made.depth or made.mixes or made.factored or made.makes)
    trains = alike and made.refits and not job.wraps  # every layer has the MoE's own experts, or a dense model's FFN
    if recipe.refit == "scale" or (recipe.refit == "blocks" and not trains):
        raise UsageError(
            f"refit: {recipe.refit} is of splits, and {recipe.method} compresses a Mixture-of-Experts"
            if recipe.refit == "scale"
            else f"refit: blocks trains experts of the MoE's own class, and {recipe.method} makes others"
            + (f" into {WRAPPED}" if job.wraps else ""),
            hint="--refit down, blocks or none" if trains else "--refit down or none",
        )
    clamped = job.moe.family.clamped
    if clamped and (recipe.refit == "blocks" or made.ternary):
        what = f"{recipe.method} rounds" if made.ternary else "refit: blocks trains"
        raise RefusalError(
            f"{what} gate, up and down of experts alone, and those of a '{job.moe.family.name}' model have biases, too",
            hint="another method" if made.ternary else "--refit down",
        )
    if recipe.refit == "down" and not job.compression.refits:
        raise UsageError(
            f"refit: down would fill the zeros that {recipe.method} makes", hint="--refit none, or leave it out"
        )
    if job.calibrated:
        looks = recipe.observations is None or job.compression.tries or job.compression.makes
        what = f"method {recipe.method}" if looks else f"refit: {job.refit} (--refit none needs no text)"
        if recipe.precision.looks:
            what = "rounding by GPTQ, which --rounding nearest leaves out,"
        check_text(recipe, what)
    return stored_in_bits(job)


def stored_in_bits(job: C, bits: Mapping[int, tuple[int, ...]] | None = None) -> C:
    """Return the job with weights in the bits that its recipe wants; ``bits`` of every expert by layer, None: not decided yet.

    Raises:
        RefusalError: no loader holds experts of this architecture in few bits, or the result is a dense model.
        UsageError: matrices are too narrow.
    """
    recipe = job.recipe.precision
    if recipe.bits is None:
        usual = type(recipe)()  # a recorded recipe names what it left at its default, too
        if odd := sorted(name for name in type(recipe).model_fields if getattr(recipe, name) != getattr(usual, name)):
            raise UsageError(f"precision: '{odd[0]}' says nothing without bits", hint="--bits 4")
        return job
    if job.compression.dense:
        raise RefusalError(
            f"precision: {job.method.name} makes a dense model, and experts alone are stored in few bits",
            hint="leave --bits out, and round the dense model with llm-compressor or GPTQModel",
        )
    made = job.compression
    trained = job.refit == "blocks"
    if job.wraps or made.depth or made.mixes or made.factored or made.makes or made.ternary or trained:
        more = " with refit: blocks" if trained else f" into {WRAPPED}" if job.wraps else ""
        what = f"{job.method.name}{more}"
        raise UsageError(
            f"precision: {what} and few bits are two steps",
            hint="leave --target out"
            if job.wraps
            else "leave --bits out: ternary experts are stored by upcycle pack"
            if made.ternary
            else "leave --bits out, and compress what it makes once more by --bits alone",
        )
    scheme = scheme_of(job.moe, job.grown.config, recipe, bits)
    shards = in_bits(
        shards_of_grown(job.recipe, job.source, job.grown), job.moe, scheme, parse_size(job.recipe.max_shard_size)
    )
    promise, why = job.grown.promise
    stored = f"experts are stored in {said_bits(job.recipe.precision)}"
    grown = replace(
        job.grown,
        promise=("approximate", stored if promise == "exact" else f"{why}, and {stored}"),
        summary=f"{job.grown.summary}, {stored.removeprefix('experts are stored ')}"
        if job.compression.removes
        else stored,
        warnings=(*job.grown.warnings, *_bits_warnings(scheme)),
    )
    return replace(job, grown=grown, shards=shards, scheme=scheme)


def said_bits(recipe: PrecisionRecipe) -> str:
    """Return the precision of experts in words."""
    if recipe.mean is not None:
        return f"{recipe.mean:g} bits in the mean"
    return "FP8" if recipe.bits == FP8_BITS else f"{recipe.bits} bits"


def _bits_warnings(scheme: Scheme) -> list[str]:
    found = []
    if scheme.mixed:
        found.append(
            "stock transformers (5.23) unpacks all experts of a model in one width and refuses this one; upcycle reads it (evaluate, "
            "generate, verify), and it is written as vLLM's loader expects it; --bits 2 to 8 and fp8 load everywhere"
        )
    if scheme.mixed and any(len(set(own)) > 1 for own in scheme.bits.values()):
        found.append(
            "experts of one layer have several widths, which no fused kernel of vLLM takes: --allocation layers"
        )
    return found


def write_cuts(folder: Path, cuts: dict[int, Cut], more: dict[str, Any]) -> None:
    """Write what was decided of every layer; the file appears complete or not at all."""
    path = folder / CUTS_FILE
    temporary = path.with_suffix(".tmp")
    content = {"experts": {str(layer): described_cut(cut) for layer, cut in cuts.items()}, **more}
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    temporary.rename(path)


def decided_cuts(job: C, folder: Path) -> C:
    """Return the job with the cuts that are written in ``folder``."""
    cuts = read_cuts(folder)
    grown = job.compression.grow(job.source, job.recipe, cuts)
    found = replace(job, grown=grown, shards=shards_of_grown(job.recipe, job.source, grown))
    bits = read_json(folder / CUTS_FILE).get("precision", {}).get("bits")
    return stored_in_bits(found, bits and {int(layer): tuple(own) for layer, own in bits.items()})


def read_cuts(folder: Path) -> dict[int, Cut]:
    """Return the cuts that are written in ``folder``, by layer."""
    return {int(layer): cut_of(found) for layer, found in read_json(folder / CUTS_FILE)["experts"].items()}


def cut_reports(folder: Path) -> list[dict[str, Any]]:
    """Return, for every layer, what its experts are made of, and how the refit went."""
    content = read_json(folder / CUTS_FILE)
    refits, rounded = content.get("refit", {}), content.get("precision", {})
    return [
        {
            "layer": int(layer),
            **found,
            "refit": refits.get(layer),
            **({"precision": rounded["layers"].get(layer)} if rounded else {}),
        }
        for layer, found in content["experts"].items()
    ]
