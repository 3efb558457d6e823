"""Proves a conversion again: opens the source, runs both models on the same text, and says how equal they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.checkpoints.checkpoint import Checkpoint, DenseCheckpoint
from upcycle.errors import CheckpointError, UsageError
from upcycle.files import records
from upcycle.files.user_paths import user_path
from upcycle.hardware.memory import available_memory
from upcycle.models.stock_model import folder_model
from upcycle.planning.growth_job import GrowthJob
from upcycle.planning.job import AnyJob
from upcycle.planning.open_sources import open_sources
from upcycle.planning.prepare import job_for
from upcycle.planning.verification_text import token_windows
from upcycle.progress import SILENT, Progress
from upcycle.recipe.conversion_recipe import parse_recipe, read_recipe
from upcycle.verification.layer_errors import LayerErrors
from upcycle.verification.measure import batch_size, load_sides, measure
from upcycle.verification.verdict import Verification
from upcycle.verification.verify_experts import _judge, _trained, check_keys

if TYPE_CHECKING:
    import torch


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
    record = records.read_record(folder)
    with progress.phase("checking files", 1):
        records.check_files(folder, record)
        progress.advance()
    job, checkpoint = reopen(folder, record, source)
    text = text or job.recipe.verification.text
    merged_by = (record.get("merging") or {}).get("text")  # text that decided which sources are merged was read, too
    read = record.get("calibration") is not None or bool(merged_by)
    windows = token_windows(job, checkpoint, text, tokens, read)
    result = verify_job(job, checkpoint, folder, windows, progress, record.get("training"))
    try:
        records.write_verification(folder, result.as_dict())
    except OSError as error:
        progress.note(f"{records.VERIFICATION_FILE} cannot be written, and push needs it: {error.strerror}")
    return result


def reopen(folder: Path, record: dict[str, Any], source: str | None = None) -> tuple[AnyJob, Checkpoint]:
    """The job that wrote ``folder`` and the checkpoint it was made from, found again by its recipe and its record.

    Raises:
        UsageError: the source is not there.
        CheckpointError: it is not the one that was converted.
    """
    content = read_recipe(folder / records.RECIPE_FILE)
    if source:
        content |= {"source": source, "revision": None}
    elif record["source"]["revision"]:
        content["revision"] = record["source"]["revision"]
    for listed, opened in zip(content.get("sources") or [], record.get("sources") or [], strict=False):
        listed["revision"] = opened["revision"]
    recipe = parse_recipe(content, str(folder / records.RECIPE_FILE))
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
        moe = folder_model(folder, streamed)
        progress.advance()
    layers = LayerErrors(job, moe, checkpoint)
    batch = batch_size(job.vocab_size, ids, streamed)
    measured = measure(sides, moe, ids, batch, elements, progress, layers.measured_on)
    if training is not None:
        return _trained(layers, measured, label, streamed, training)
    return _judge(job, layers, measured, label, streamed)
