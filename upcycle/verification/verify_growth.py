"""Verifies that the result of a growth step is what the step declares: every tensor, and the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from upcycle.architectures.dense.widened import GrownTensor, new_parts
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.output_layout import OutputEntry
from upcycle.errors import CheckpointError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.hardware.memory import available_memory
from upcycle.models.growth_masks import GrowthMasks
from upcycle.models.stock_model import folder_model
from upcycle.planning.growth_job import GrowthJob
from upcycle.planning.verification_text import MeasuredText
from upcycle.progress import Progress
from upcycle.registry import find
from upcycle.verification.measure import batch_size, load_sides, measure_difference
from upcycle.verification.media import compare_parts
from upcycle.verification.verdict import EXACT_TOLERANCE, Verification, said
from upcycle.verification.verify_experts import check_keys, since_conversion


def verify_growth(
    job: GrowthJob,
    checkpoint: Checkpoint,
    folder: Path,
    windows: MeasuredText,
    progress: Progress,
    same: Callable[[OutputEntry], bool] = lambda _: True,
    training: dict[str, Any] | None = None,
) -> Verification:
    """Compare ``folder`` with the source, tensor by tensor and then by the logits of both models, in fp32.

    What is new in a result of masked growth is masked.

    Args:
        job: what was done, with its decision.
        checkpoint: the source.
        folder: the result.
        windows: what to measure on.
        progress: where to report.
        same: tells which tensors must equal their origins; the others were fitted.
        training: how the result was trained since, if it was: then nothing is promised but that it is whole, and its logits finite.

    Raises:
        CheckpointError: a tensor differs from its origin, or the stock class does not load the folder cleanly.
    """
    check_keys(job, folder)
    compared = 0 if training else _compare_tensors(job, checkpoint, folder, progress, same)
    elements = sum(entry.spec.elements for unit in job.units for entry in unit.entries)
    elements += sum(spec.elements for spec in checkpoint.store.specs.values())
    streamed = 4 * elements > 0.6 * available_memory()
    ids, label, *_ = windows
    with progress.phase("loading both models", 2):
        sides = load_sides(checkpoint, job.recipe.dtype, streamed)
        progress.advance()
        after = folder_model(folder, streamed)
        if (new := new_parts(folder)) is not None:
            GrowthMasks(after.model, new)  # as training begins
        progress.advance()
    measured = measure_difference(sides, after, ids, batch_size(job.vocab_size, ids, streamed), elements, progress)
    if (wrapper := find("wrapper", job.family_name)) is not None and job.target_name == job.family_name:
        where, seed = checkpoint.source.path, job.recipe.seed
        measured = replace(measured, media=compare_parts(sides.judge, after, wrapper, where, seed, progress))
    promise, explanation = ("trained", since_conversion(training)) if training else job.promise
    tolerance = EXACT_TOLERANCE if promise == "exact" else None
    verdict: Literal["exact", "approximate", "broken"] = "exact" if promise == "exact" else "approximate"
    explanation += measured.remarks
    if measured.totals.fault:
        verdict, explanation = "broken", measured.totals.fault
    elif tolerance is not None and not measured.worst <= tolerance:
        verdict = "broken"
        explanation = f"relative logit error {said(measured.worst, '.1e')}, promised below {tolerance:.1e}"
    return Verification(
        verdict=verdict,
        explanation=explanation,
        promise=promise,
        tolerance=measured.allowed(tolerance),
        layer_errors=[],
        all_experts_error=None,
        all_experts_reference="",
        text=label,
        streamed=streamed,
        compared_tensors=compared,
        **measured.numbers,
    )


def _compare_tensors(
    job: GrowthJob, checkpoint: Checkpoint, folder: Path, progress: Progress, same: Callable[[OutputEntry], bool]
) -> int:
    """Compare tensors with their origins, bit for bit, in blocks; return the number of tensors that were compared.

    Raises:
        CheckpointError: a tensor differs.
    """
    written, compared = SafetensorsFolder(folder), 0
    with progress.phase("comparing tensors", sum(1 for _ in job.units)):
        for unit in job.units:
            for entry in unit.entries:
                assert entry.origin is not None
                if not same(entry):
                    continue
                if isinstance(entry.origin, GrownTensor):
                    _compare_grown(entry, entry.origin, checkpoint, job.recipe.dtype, written)
                    compared += 1
                    continue
                first = 0
                for block in checkpoint.blocks(entry.origin, job.recipe.dtype):
                    rows = len(block) if block.dim() else 1
                    (found,) = written.chunks(entry.name, max(1, block.nbytes), (first, rows), rows)
                    if not torch.equal(_bits(found), _bits(block)):
                        raise CheckpointError(
                            f"{written.location(entry.name)}: tensor '{entry.name}' is not '{entry.origin.name}' of the source"
                        )
                    first += rows
                compared += 1
            progress.advance()
    return compared


def _compare_grown(
    entry: OutputEntry, origin: GrownTensor, checkpoint: Checkpoint, dtype: str, written: SafetensorsFolder
) -> None:
    """Compare a tensor that grew with what it must be: the source's tensor, and what is drawn beside it from the seed."""
    old = torch.cat([*checkpoint.blocks(Origin(origin.name), dtype)])
    if not torch.equal(_bits(written.read(entry.name)), _bits(origin.grown(entry.name, old))):
        raise CheckpointError(
            f"{written.location(entry.name)}: tensor '{entry.name}' is not '{origin.name}' of the source with what was drawn beside it"
        )


def _bits(block: torch.Tensor) -> torch.Tensor:
    """Return a block as bytes, so that minus zero differs from zero and NaN equals itself."""
    return block.contiguous().view(-1).view(torch.uint8)
