"""Measures how far a converted model is from its dense parent: in fp32, on real text, with stock modelling code."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from upcycle.architectures.towers.composite import CompositeFamily
from upcycle.architectures.towers.parts import LANGUAGE, PartsFamily
from upcycle.errors import CheckpointError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.hardware.memory import available_memory
from upcycle.models.stock_model import folder_model
from upcycle.planning.expert_job import ExpertJob
from upcycle.planning.job import PlannedJob
from upcycle.verification.layer_errors import LayerErrors
from upcycle.verification.measure import ModelDifference, batch_size, load_sides, measure_difference, measure_losses
from upcycle.verification.media import compare_parts, held_out_inputs
from upcycle.verification.neurons_run import NeuronsRun
from upcycle.verification.verdict import EXACT_TOLERANCE, STATES, Verification, said

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint
    from upcycle.planning.verification_text import MeasuredText
    from upcycle.progress import Progress

# Unit roundoff: the largest relative error of storing one number. Logits are computed in fp32, whatever the stored dtype.
_ROUNDOFF = {
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
    "float32": 2.0**-24,
    "float64": 2.0**-24,
}


def verify_experts(
    job: ExpertJob,
    checkpoint: DenseCheckpoint,
    folder: Path,
    windows: MeasuredText,
    progress: Progress,
    training: dict[str, Any] | None = None,
) -> Verification:
    """Compare ``folder`` with the dense model that it was made from, in fp32: logits, and every layer.

    Args:
        job: the conversion.
        checkpoint: the dense model.
        folder: the result.
        windows: what to measure on.
        progress: where to report.
        training: how the result was trained since, if it was.

    Raises:
        CheckpointError: the folder's tensors are not those of the plan, or stock transformers does not load it cleanly.
    """
    check_keys(job, folder)
    elements = sum(entry.spec.elements for unit in job.units for entry in unit.entries)
    elements += sum(spec.elements for spec in checkpoint.store.specs.values())
    streamed = 4 * elements > 0.6 * available_memory()
    ids, label, unseen, given = windows
    with progress.phase("loading both models", 2):
        sides = load_sides(checkpoint, job.recipe.dtype, streamed)
        progress.advance()
        moe = folder_model(folder, streamed)
        progress.advance()
    layers = LayerErrors(job, moe, checkpoint)
    batch = batch_size(job.vocab_size, ids, streamed, media=given is not None)
    running = NeuronsRun(moe.model, job.dense.intermediate_size)
    with running.counted():
        measured = measure_difference(sides, moe, ids, batch, elements, progress, layers.measured_on, given)
    if isinstance(job.family, CompositeFamily | PartsFamily):
        # Of the text model's layers, what texts give is enough; no text runs through other parts.
        watched = layers.measured_on(sides.judge) if isinstance(job.family, PartsFamily) else nullcontext()
        with watched:
            held = held_out_inputs(job, checkpoint)
            where, seed = checkpoint.source.path, job.recipe.seed
            media = compare_parts(sides.judge, moe, job.family.wrapper, where, seed, progress, held)
        measured = replace(measured, media=media)
    if training is not None:
        result = _trained(layers, measured, label, streamed, training)
    else:
        result = _judge(job, layers, measured, label, streamed)
    result = replace(result, neurons_run=running.shares)
    if unseen is None or result.verdict != "approximate":
        return result
    return replace(result, unseen=measure_losses(sides.plain, moe, unseen, batch, progress))


def _unmeasured(job: ExpertJob, measured: ModelDifference) -> str | None:
    """Return why experts in parts that read no text were not compared with what they stand for; None: they were, or there are none."""
    if not isinstance(job.family, PartsFamily) or measured.media is None or measured.media.error is not None:
        return None
    texts = job.family.layers_of((LANGUAGE,), job.dense.num_hidden_layers)
    others = len(set(job.shape.moe_layers) - set(texts))
    return f"{others} layers of experts read no text, and {measured.media.what}" if others else None


def check_keys(job: PlannedJob, folder: Path) -> None:
    """Compare the stored names, shapes and dtypes with the plan.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape or dtype.
    """
    stored = SafetensorsFolder(folder).specs
    planned = {entry.name: entry.spec for unit in job.units for entry in unit.entries}
    if stored != planned:
        wrong = sorted(name for name in set(stored) | set(planned) if stored.get(name) != planned.get(name))
        raise CheckpointError(f"{folder}: tensor '{wrong[0]}' is not as planned ({len(wrong)} such tensors)")


def _trained(
    layers: LayerErrors, measured: ModelDifference, label: str, streamed: bool, training: dict[str, Any]
) -> Verification:
    """Return the verdict on a model that was trained since its conversion.

    It computes another function than its dense parent; the promise is only that it is whole and its logits are finite.
    """
    return Verification(
        verdict="broken" if measured.totals.fault else "approximate",
        explanation=measured.totals.fault or since_conversion(training) + measured.remarks + layers.remark,
        promise="trained",
        tolerance=None,
        layer_errors=layers.relative,
        all_experts_error=None,
        all_experts_reference=layers.reference,
        text=label,
        streamed=streamed,
        **measured.numbers,
    )


def since_conversion(training: dict[str, Any]) -> str:
    """Return what was done to a model since its conversion, in words."""
    steps = f"trained for {training['step']:,} steps, {training['tokens']:,} tokens" if "step" in training else ""
    merged = ", ".join(entry["name"] for entry in training.get("adapters", ()))
    done = " and ".join(filter(None, (steps, f"given an adapter ({merged})" if merged else "")))
    return f"{done}, since it was converted"


def _judge(job: ExpertJob, layers: LayerErrors, measured: ModelDifference, label: str, streamed: bool) -> Verification:
    promise, reason = job.promise
    error = measured.worst
    roundoff = _ROUNDOFF[job.dtype]
    # The rounding errors of the layers are independent: like a random walk, they grow with the root of their number.
    tolerance = {"exact": EXACT_TOLERANCE, "rounded": roundoff * math.sqrt(job.dense.num_hidden_layers)}.get(promise)
    everyone = layers.all_experts
    verdict: Literal["exact", "approximate", "broken"] = "exact" if promise == "exact" else "approximate"
    explanation = reason
    if everyone is not None and job.members:
        explanation += f"; with all experts at equal weight a layer is {layers.reference} (within {everyone:.1e})"
    explanation += measured.remarks + layers.remark
    if measured.totals.fault:
        verdict, explanation = "broken", measured.totals.fault
    elif (unseen := _unmeasured(job, measured)) is not None:
        verdict, explanation = "broken", unseen
    elif tolerance is not None and not error <= tolerance:
        behind = f" behind position {measured.reach.border:,}" if error == measured.far else ""
        behind = (
            " with what its other parts read"
            if measured.media is not None and error == measured.media.error
            else behind
        )
        verdict = "broken"
        what = "relative logit error" if measured.totals.of_logits else f"relative error of the {STATES}"
        explanation = f"{what} {said(error, '.1e')}{behind}, promised below {tolerance:.1e}"
    elif everyone is not None and not everyone <= (roundoff if job.rounding else EXACT_TOLERANCE):
        verdict = "broken"
        explanation = (
            f"with all experts active a layer is off by {said(everyone, '.1e')}, and it must equal {layers.reference}"
        )
    return Verification(
        verdict=verdict,
        explanation=explanation,
        promise=promise,
        tolerance=measured.allowed(tolerance),
        layer_errors=layers.relative,
        all_experts_error=everyone,
        all_experts_reference=layers.reference,
        text=label,
        streamed=streamed,
        **measured.numbers,
    )
