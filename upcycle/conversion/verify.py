"""Verifies a converted model again: opens its source, runs both models on the same text, and measures the difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.conversion.job import ConversionJob
from upcycle.conversion.jobs import job_for
from upcycle.errors import CheckpointError, UsageError
from upcycle.files import records
from upcycle.files.user_paths import user_path
from upcycle.notebook import IN_NOTEBOOKS
from upcycle.planning.job import method_of
from upcycle.planning.open_sources import open_sources
from upcycle.planning.verification_text import token_windows
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import parse_recipe, read_recipe
from upcycle.verification.verdict import Verification


def verify(
    out: str | Path,
    *,
    source: str | None = None,
    text: str | None = None,
    tokens: int = 1024,
    progress: Progress = IN_NOTEBOOKS,
) -> Verification:
    """Verify a folder that :func:`upcycle.convert` wrote, and keep the result in its ``verification.json``.

    Args:
        out: the converted model.
        source: the dense model, when it is no longer where ``recipe.yaml`` says.
        text: UTF-8 file (of a model that reads images, folder) to measure on; default: the recipe's, or else what was held out of
            the calibration text, or else the embedded validation texts.
        tokens: the number of tokens to measure on.
        progress: where to report.

    Raises:
        CheckpointError: a file is missing or has changed since it was written, or the source is not the one converted.
        UsageError: the source is not found, or the text cannot be read.
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
    since = {**(record.get("training") or {}), **({"adapters": record["adapters"]} if record.get("adapters") else {})}
    result = job.verify(checkpoint, folder, windows, progress, since or None)
    try:
        records.write_verification(folder, result.as_dict())
    except OSError as error:
        progress.note(f"{records.VERIFICATION_FILE} cannot be written, and push needs it: {error.strerror}")
    return result


def reopen(folder: Path, record: dict[str, Any], source: str | None = None) -> tuple[ConversionJob, Checkpoint]:
    """Return the job that wrote ``folder``, and the checkpoint that it converted, from the folder's recipe and record.

    Raises:
        UsageError: the source is not found.
        CheckpointError: the source is not the one that was converted.
    """
    content = read_recipe(folder / records.RECIPE_FILE)
    if source:
        content |= {"source": source, "revision": None}
    elif record["source"]["revision"]:
        content["revision"] = record["source"]["revision"]
    for listed, opened in zip(content.get("sources") or [], record.get("sources") or [], strict=False):
        listed["revision"] = opened["revision"]
    recipe = parse_recipe(content, str(folder / records.RECIPE_FILE))
    method = method_of(recipe)
    try:
        checkpoint = open_sources(recipe, method)
    except UsageError as error:
        raise UsageError(f"the dense model is needed: {error.message}", hint="say where it is with --source") from None
    if checkpoint.fingerprint != record["source"]["fingerprint"]:
        raise CheckpointError(
            f"{recipe.source} is not the checkpoint {folder} was converted from",
            hint="name the right one with --source",
        )
    return job_for(recipe, method, checkpoint), checkpoint
