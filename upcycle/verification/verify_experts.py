"""Says how equal a converted model is to its dense parent: measured in fp32, on real text, with stock modelling code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from upcycle.checkpoints.checkpoint import Checkpoint, DenseCheckpoint
from upcycle.checkpoints.mixed_checkpoint import open_sources
from upcycle.conversion import record as provenance
from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.user_paths import user_path
from upcycle.models.stock_model import available_memory, folder_model
from upcycle.planning.cost import AnyJob, job_for
from upcycle.planning.expert_job import Job
from upcycle.planning.growth_job import GrowthJob
from upcycle.planning.verification_text import token_windows
from upcycle.progress import SILENT, Progress
from upcycle.recipe.conversion_recipe import parse_recipe, read_recipe
from upcycle.verification.layer_errors import LayerErrors
from upcycle.verification.measure import Measured, batch_size, load_sides, measure
from upcycle.verification.verdict import EXACT_TOLERANCE, Verification, said

if TYPE_CHECKING:
    import torch

# Unit roundoff: the largest relative error of storing one number.
_ROUNDOFF = {
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
    "float32": 2.0**-24,
    "float64": 2.0**-24,
}  # logits are computed in fp32


def verify(
    out: str | Path,
    *,
    source: str | None = None,
    text: str | None = None,
    tokens: int = 1024,
    progress: Progress = SILENT,
) -> Verification:
    """Verify a folder that :func:`upcycle.convert` wrote, and keep the result in its ``verification.json``.

    Args:
        out: the converted model.
        source: the dense model, when it is no longer where ``recipe.yaml`` says.
        text: UTF-8 file to measure on; default: the embedded validation texts.
        tokens: how many tokens of it.
        progress: where to report.

    Raises:
        CheckpointError: a file is missing or has changed since it was written, or the source is not the one converted.
    """
    folder = user_path(out)
    record = provenance.read(folder)
    with progress.phase("checking files", 1):
        provenance.check_files(folder, record)
        progress.advance()
    job, checkpoint = reopen(folder, record, source)
    text = text or job.recipe.verification.text
    merged_by = (record.get("merging") or {}).get("text")  # text that decided which sources are merged was read, too
    read = record.get("calibration") is not None or bool(merged_by)
    windows = token_windows(job, checkpoint, text, tokens, read)
    result = verify_job(job, checkpoint, folder, windows, progress, record.get("training"))
    try:
        provenance.write_verification(folder, result.as_dict())
    except OSError as error:
        progress.note(f"{provenance.VERIFICATION_FILE} cannot be written, and push needs it: {error.strerror}")
    return result


def reopen(folder: Path, record: dict[str, Any], source: str | None = None) -> tuple[AnyJob, Checkpoint]:
    """The job that wrote ``folder`` and the checkpoint it was made from, found again by its recipe and its record.

    Raises:
        UsageError: the source is not there.
        CheckpointError: it is not the one that was converted.
    """
    content = read_recipe(folder / provenance.RECIPE_FILE)
    if source:
        content |= {"source": source, "revision": None}
    elif record["source"]["revision"]:
        content["revision"] = record["source"]["revision"]
    for listed, opened in zip(content.get("sources") or [], record.get("sources") or [], strict=False):
        listed["revision"] = opened["revision"]
    recipe = parse_recipe(content, str(folder / provenance.RECIPE_FILE))
    try:
        checkpoint = open_sources(recipe)
    except UsageError as error:
        raise UsageError(f"the dense model is needed: {error.message}", hint="say where it is with --source") from None
    if checkpoint.fingerprint != record["source"]["fingerprint"]:
        raise CheckpointError(
            f"{recipe.source} is not the checkpoint {folder} was converted from",
            hint="name the right one with --source",
        )
    return job_for(recipe, checkpoint), checkpoint


def verify_job(
    job: AnyJob,
    checkpoint: Checkpoint,
    folder: Path,
    windows: tuple[torch.Tensor, str],
    progress: Progress = SILENT,
    training: dict[str, Any] | None = None,
) -> Verification:
    """Compare ``folder`` with the checkpoint it was made from.

    Args:
        job: what was to be made.
        checkpoint: the source.
        folder: the result.
        windows: token ids ``[N, W]`` to measure on, and what they are from.
        progress: where to report.
        training: how the result was trained since, if it was.

    Raises:
        CheckpointError: the folder is not what was planned, or stock transformers does not load it cleanly.
    """
    if isinstance(job, GrowthJob):
        from upcycle.verification.verify_growth import verify_growth

        return verify_growth(job, checkpoint, folder, windows, progress)
    assert isinstance(checkpoint, DenseCheckpoint)
    check_keys(job, folder)
    elements = sum(entry.spec.elements for unit in job.units for entry in unit.entries)
    elements += sum(spec.elements for spec in checkpoint.store.specs.values())
    streamed = 4 * elements > 0.6 * available_memory()
    ids, label = windows
    with progress.phase("loading both models", 2):
        sides = load_sides(checkpoint, job.recipe.dtype, streamed)
        progress.advance()
        moe = folder_model(folder, streamed, job.target.blocks)
        progress.advance()
    layers = LayerErrors(job, moe, checkpoint)
    batch = batch_size(job.vocab_size, ids, streamed)
    measured = measure(sides, moe, ids, batch, elements, progress, layers.measured_on)
    if training is not None:
        return _trained(layers, measured, label, streamed, training)
    return _judge(job, layers, measured, label, streamed)


def check_keys(job: AnyJob, folder: Path) -> None:
    """Compare the stored names, shapes and dtypes with the plan.

    Raises:
        CheckpointError: one differs.
    """
    stored = SafetensorsFolder(folder).specs
    planned = {entry.name: entry.spec for unit in job.units for entry in unit.entries}
    if stored != planned:
        wrong = sorted(name for name in set(stored) | set(planned) if stored.get(name) != planned.get(name))
        raise CheckpointError(f"{folder}: tensor '{wrong[0]}' is not as planned ({len(wrong)} such tensors)")


def _trained(
    layers: LayerErrors, measured: Measured, label: str, streamed: bool, training: dict[str, Any]
) -> Verification:
    """A trained model is another function than its dense parent: what is promised is that it is whole, and finite."""
    done = f"trained for {training['step']:,} steps, {training['tokens']:,} tokens, since it was converted"
    return Verification(
        verdict="broken" if measured.totals.fault else "approximate",
        explanation=measured.totals.fault or done + measured.remarks + layers.remark,
        promise="trained",
        tolerance=None,
        layer_errors=layers.relative,
        all_experts_error=None,
        all_experts_reference=layers.reference,
        text=label,
        streamed=streamed,
        **measured.numbers,
    )


def _judge(job: Job, layers: LayerErrors, measured: Measured, label: str, streamed: bool) -> Verification:
    promise, reason = job.promise
    error = measured.worst
    roundoff = _ROUNDOFF[job.dtype]
    # Layers' rounding errors are independent: they add up like a random walk.
    tolerance = {"exact": EXACT_TOLERANCE, "rounded": roundoff * math.sqrt(job.dense.num_hidden_layers)}.get(promise)
    everyone = layers.all_experts
    verdict: Literal["exact", "approximate", "broken"] = "exact" if promise == "exact" else "approximate"
    explanation = reason
    if everyone is not None and job.method.members:
        explanation += f"; with all experts at equal weight a layer is {layers.reference} (within {everyone:.1e})"
    explanation += measured.remarks + layers.remark
    if measured.totals.fault:
        verdict, explanation = "broken", measured.totals.fault
    elif tolerance is not None and not error <= tolerance:
        behind = f" behind position {measured.reach.border:,}" if error == measured.far else ""
        verdict = "broken"
        explanation = f"relative logit error {said(error, '.1e')}{behind}, promised below {tolerance:.1e}"
    elif everyone is not None and not everyone <= (roundoff if job.rounding_factors else EXACT_TOLERANCE):
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
