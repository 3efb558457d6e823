"""Says whether the result of a growth step is what it is declared to be: every tensor, and what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from upcycle.checkpoint import Checkpoint, DenseCheckpoint
from upcycle.errors import CheckpointError
from upcycle.growth import GrowthJob, decided_growth
from upcycle.moe_checkpoint import MoeCheckpoint
from upcycle.progress import Progress
from upcycle.runtime import StockModel, available_memory, dense_model
from upcycle.sources import Source
from upcycle.stock import load_model
from upcycle.tensor_files import SafetensorsFolder
from upcycle.verdict import EXACT_TOLERANCE, Totals, Verification
from upcycle.verification import batch_size, check_keys, token_windows


def verify_growth(
    job: GrowthJob, checkpoint: Checkpoint, folder: Path, text: str | None, tokens: int, progress: Progress
) -> Verification:
    """Compare ``folder`` with the source, tensor by tensor and then in what both compute, in fp32.

    Raises:
        CheckpointError: a tensor is not the one it was made from, or the stock class does not load the folder cleanly.
    """
    job = decided_growth(job, folder)
    check_keys(job, folder)
    compared = _compare_tensors(job, checkpoint, folder, progress)
    elements = sum(entry.spec.elements for unit in job.units for entry in unit.entries)
    elements += sum(spec.elements for spec in checkpoint.store.specs.values())
    streamed = 4 * elements > 0.6 * available_memory()
    with progress.phase("loading text and both models", 3):
        ids, label = token_windows(job, checkpoint, text, tokens)
        progress.advance()
        before = stock_model(checkpoint, job.recipe.dtype, streamed)
        progress.advance()
        after = _result(type(checkpoint), folder, streamed)
        progress.advance()
    totals = Totals()
    batches = ids.split(batch_size(job, ids, streamed))
    with progress.phase("verifying", 2 * len(batches)):
        for batch in batches:
            expected = before.logits(batch)
            progress.advance()
            totals.add(batch, expected, after.logits(batch))
            progress.advance()
    promise, explanation = job.promise
    tolerance = EXACT_TOLERANCE if promise == "exact" else None
    verdict: Literal["exact", "approximate", "broken"] = "exact" if promise == "exact" else "approximate"
    explanation += totals.remark
    if totals.fault:
        verdict, explanation = "broken", totals.fault
    elif tolerance is not None and totals.relative_error > tolerance:
        verdict = "broken"
        explanation = f"relative logit error {totals.relative_error:.1e}, promised below {tolerance:.1e}"
    return Verification(
        verdict=verdict,
        explanation=explanation,
        promise=promise,
        tolerance=tolerance,
        layer_errors=[],
        all_experts_error=None,
        all_experts_reference="",
        text=label,
        streamed=streamed,
        compared_tensors=compared,
        **totals.numbers,
    )


def _compare_tensors(job: GrowthJob, checkpoint: Checkpoint, folder: Path, progress: Progress) -> int:
    """Compare every tensor with its origin, bit for bit, in blocks; returns how many there are.

    Raises:
        CheckpointError: one differs.
    """
    written, compared = SafetensorsFolder(folder), 0
    with progress.phase("comparing tensors", sum(1 for _ in job.units)):
        for unit in job.units:
            for entry in unit.entries:
                assert entry.origin is not None
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


def _bits(block: torch.Tensor) -> torch.Tensor:
    """As bytes: minus zero is not zero."""
    return block.contiguous().view(-1).view(torch.uint8)


def stock_model(checkpoint: Checkpoint, dtype: str, streamed: bool) -> StockModel:
    """The stock model of a source, its weights rounded to ``dtype``, computed in fp32."""
    if isinstance(checkpoint, MoeCheckpoint):
        return StockModel.from_reader(checkpoint.raw_config, checkpoint.stock_state, streamed)
    assert isinstance(checkpoint, DenseCheckpoint)
    return dense_model(checkpoint, dtype, streamed)


def _result(kind: type[Checkpoint], folder: Path, streamed: bool) -> StockModel:
    """The result: loaded as every user would, or streamed."""
    if not streamed:
        return StockModel(load_model(folder))
    cls = MoeCheckpoint if issubclass(kind, MoeCheckpoint) else DenseCheckpoint
    return stock_model(cls(Source(str(folder), folder)), "keep", streamed)
