"""Says how equal a converted model is to its dense parent: measured in fp32, on real text, with stock modelling code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from upcycle.errors import CheckpointError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.planning.expert_job import Job
from upcycle.planning.job import AnyJob
from upcycle.verification.layer_errors import LayerErrors
from upcycle.verification.measure import Measured
from upcycle.verification.verdict import EXACT_TOLERANCE, Verification, said

if TYPE_CHECKING:
    pass

# Unit roundoff: the largest relative error of storing one number.
_ROUNDOFF = {
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
    "float32": 2.0**-24,
    "float64": 2.0**-24,
}  # logits are computed in fp32


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
