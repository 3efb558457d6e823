"""Compares ways to compress one Mixture-of-Experts, and recommends one.

The MoE is observed once. Every candidate is then written by the code of ``upcycle compress`` into a temporary folder, measured there
beside the uncut model, and removed before the next.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from upcycle.architectures.moe_families import describes_moe
from upcycle.architectures.stock import load_tokenizer
from upcycle.calibration.compressing.observe_file import observe
from upcycle.calibration.compressing.observe_moe import gram_shape, sampled_tokens
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.conversion.convert import run_recipe
from upcycle.errors import EnvironmentFault, UsageError
from upcycle.evaluation.compare import check_goal
from upcycle.evaluation.compressing.cut_candidates import REFITS, CutCandidate, CutOptions, compression_names
from upcycle.evaluation.compressing.cut_comparison import CutComparison, CutResult, concerns, ranked, recommend_cuts
from upcycle.evaluation.compressing.cut_measures import CutMeasures, CutMeter, CutTexts, cut_texts
from upcycle.evaluation.compressing.cut_times import CutTiming, time_cuts
from upcycle.evaluation.timed_dtype import AUTO, timed_dtype
from upcycle.files.formats.tensor_files import read_config
from upcycle.files.locate import locate
from upcycle.files.output.scratch import scratch
from upcycle.formatting import duration, size
from upcycle.hardware.memory import available_memory
from upcycle.methods.compressing.base import LOSS_WARNING
from upcycle.methods.compressing.observations import MOST_GRAM
from upcycle.models.stock_model import folder_model
from upcycle.notebook import IN_NOTEBOOKS
from upcycle.progress import Progress
from upcycle.text.mixture import text_names
from upcycle.text.reading.plain_text import SELF_WRITTEN

CALIBRATION_TOKENS = 8192


def is_moe(source: str) -> bool:
    """Return whether a source is a MoE that :func:`compare_compressions` takes, by its ``config.json``.

    Raises:
        UpcycleError: there is no such source.
    """
    path = locate(source, config_only=True).path
    if path.is_file():
        return False
    return describes_moe(read_config(path))


def compare_compressions(
    source: str,
    *,
    compress: Sequence[str] = ("all",),
    keep: Sequence[float] = (0.75, 0.5),
    calibration: str | Sequence[str] = "demo",
    calibration_tokens: int = CALIBRATION_TOKENS,
    window: int = 256,
    text: Sequence[str] = (),
    tokens: int = 2048,
    faster: float | None = None,
    within: float | None = None,
    batch: int = 1,
    timed: bool = True,
    dtype: str = AUTO,
    seed: int = 0,
    progress: Progress = IN_NOTEBOOKS,
) -> CutComparison:
    """Compare methods that compress a MoE at every size, with and without the refit, on the same observations.

    Args:
        source: the MoE: a local folder or hub id.
        compress: methods, or ``name:key=value``; ``all`` takes every one. Random experts are always among them.
        keep: the parts that are kept.
        calibration: texts to calibrate on, one per domain.
        calibration_tokens: tokens to calibrate on.
        window: tokens per window.
        text: texts to measure on; default: what is held out of the calibration texts. Text of another kind is measured besides.
        tokens: tokens to measure on, per text.
        faster: recommend the best among the compressions at least so many times as fast as the uncut model.
        within: recommend the smallest among those whose perplexity is at most so many times the uncut model's, calibrated kinds and
            others together.
        batch: sequences at a time, where speed is measured.
        timed: measure speed: models of the candidates' shapes with random weights, beside the uncut one.
        dtype: in which speed is measured; ``auto``: the stored one where this CPU multiplies it natively, else fp32.
        seed: seed of every random choice.
        progress: receives the progress, and is told what takes how long.

    Raises:
        UsageError: a name is unknown, nothing can be cut, a text is too short, or no candidate meets the goal.
        RefusalError: the source is no MoE that can be compressed.
        EnvironmentFault: the disk has no room for a candidate.
    """
    keep = list(dict.fromkeys(keep))
    texts = [calibration] if isinstance(calibration, str) else list(calibration)
    _check(keep, texts, faster, within, timed)
    methods = compression_names(compress)
    checkpoint = MoeCheckpoint.open(source)
    computed = timed_dtype(dtype, checkpoint.raw_config)
    if not checkpoint.has_tokenizer:
        raise UsageError(
            f"{source} has no tokenizer, and a comparison reads text", hint="put its files beside the weights"
        )
    options = CutOptions(checkpoint, source, texts, calibration_tokens, window, seed)
    made = [options.candidate(method, part, refit) for part in keep for method in methods for refit in REFITS]
    candidates = [one for one in made if one is not None]
    if all(one.baseline for one in candidates):
        raise UsageError(
            f"no method can keep {' or '.join(f'{part:g}' for part in keep)} of this model",
            hint=next(iter(options.skipped), "--keep 0.75,0.5"),
        )
    for warning in candidates[0].job.cost().warnings:
        if warning != LOSS_WARNING:  # which the table answers with numbers
            progress.note(warning)
    recipe = candidates[0].job.recipe
    tokenizer, model = load_tokenizer(checkpoint.source.path), checkpoint.model
    measured = cut_texts(recipe.calibration, text, tokens, window, model.context, tokenizer)
    needed = _disk_bytes(checkpoint, candidates, measured)
    _check_disk(needed)
    elements = sum(spec.elements for spec in checkpoint.store.specs.values())
    streamed = 4 * elements > 0.6 * available_memory()
    progress.tell(
        f"{len(candidates)} compressions of {source}: each is written into {tempfile.gettempdir()}, measured on "
        f"{measured.tokens:,} tokens and {len(measured.prompts)} continuations, and removed (at most {size(needed)} at a time)"
    )
    with scratch("compare") as folder:
        observations, began = folder / "observations.safetensors", time.monotonic()
        observe(source, observations, ",".join(texts), calibration_tokens, window=window, progress=progress)
        observed = time.monotonic() - began
        meter, began = CutMeter(measured, model.vocab_size, folder, streamed), time.monotonic()
        with progress.phase("measuring the uncut model", 1):
            uncut = meter.uncut(folder_model(checkpoint.source.path, streamed))
        once = time.monotonic() - began
        refits = sum(one.refit != "none" for one in candidates)
        progress.tell(
            f"observed in {duration(observed)}, measured the uncut model in {duration(once)}; the compressions will take about "
            f"{duration(len(candidates) * 1.3 * once + refits * 2 * observed)}"
            + (", and the timing of their shapes more" if timed else "")
        )
        rows = []
        with progress.phase("comparing compressions", len(candidates)):
            for one in candidates:
                with scratch("candidate") as place:
                    out = place / "model"
                    result = run_recipe(options.recipe(one.method, one.keep, one.refit, observations), out)
                    found = meter.cut(folder_model(out, streamed))
                rows.append(_row(one, found, uncut, measured, checkpoint, result.seconds, options.command(one)))
                progress.advance()
        checkpoint.check_unchanged()
    timing = time_cuts(checkpoint, candidates, batch, progress, computed) if timed else None
    if timing:
        rows = [_timed(row, one, timing) for row, one in zip(rows, candidates, strict=True)]
    results = recommend_cuts(ranked(rows), faster, within)
    return CutComparison(
        source=source,
        uncut={name: math.exp(nats) for name, nats in uncut.nats.items()},
        uncut_bytes=candidates[0].job.cost().bytes_dense,
        unseen=list(measured.unseen),
        calibration=text_names(texts),
        calibration_tokens=calibration_tokens,
        evaluation_tokens=measured.tokens,
        continuations=len(measured.prompts),
        continuation_tokens=measured.written,
        observe_seconds=observed,
        results=results,
        skipped=options.skipped,
        timing=timing.about if timing else None,
        goal={key: value for key, value in (("faster", faster), ("within", within)) if value is not None},
        warnings=concerns(results),
    )


def _check(
    keep: Sequence[float], texts: Sequence[str], faster: float | None, within: float | None, timed: bool
) -> None:
    """Refuse what cannot be compared before anything is opened."""
    if not keep:
        raise UsageError("nothing is kept", hint="--keep 0.75,0.5")
    for part in keep:
        if not 0 < part < 1:
            raise UsageError(f"keep is a fraction between 0 and 1, got {part:g}", hint="--keep 0.75,0.5")
    if not texts:
        raise UsageError("a comparison needs calibration text", hint="--calibration docs.txt,code.txt")
    if SELF_WRITTEN in texts:
        raise UsageError(
            "a comparison of compressions measures on what is held out of its calibration texts, and of self nothing is",
            hint="name texts: --calibration docs.txt,code.txt",
        )
    check_goal(faster, within, timed)


def _disk_bytes(checkpoint: MoeCheckpoint, candidates: Sequence[CutCandidate], texts: CutTexts) -> int:
    """Return how much is on the disk at a time: the observations, the uncut model's log probabilities, and one candidate."""
    model, largest = checkpoint.model, 0
    for one in candidates:
        plan, sizes = one.job.cost(), one.sizes
        down = 4 * sizes.experts * sizes.width * model.hidden_size * len(model.moe_layers) if one.job.refits else 0
        largest = max(largest, plan.bytes_output + one.job.working_bytes + down)
    experts, width = model.experts, model.expert_width
    layer = 4 * sampled_tokens(experts) * (experts * (experts + 2) + model.hidden_size)
    layer += 8 * experts * (experts + 2 * model.hidden_size)
    layer += 4 * (
        experts * width + min(MOST_GRAM, experts * width**2) + math.prod(gram_shape(experts, model.hidden_size))
    )
    return largest + len(model.moe_layers) * layer + texts.disk_bytes(model.vocab_size)


def _check_disk(needed: int) -> None:
    root = Path(tempfile.gettempdir())
    free = shutil.disk_usage(root).free
    if free < needed:
        raise EnvironmentFault(
            f"the comparison needs {size(needed)} in {root}, which has {size(free)} free",
            hint="free some space, or name another folder with TMPDIR",
        )


def _row(
    one: CutCandidate,
    found: CutMeasures,
    uncut: CutMeasures,
    texts: CutTexts,
    checkpoint: MoeCheckpoint,
    seconds: float,
    command: str,
) -> CutResult:
    plan = one.job.cost()
    lost = {name: found.nats[name] - uncut.nats[name] for name in found.nats}
    seen = fmean(lost[name] for name in texts.seen)
    unseen = fmean(lost[name] for name in texts.unseen) if texts.unseen else None
    return CutResult(
        keep=one.keep,
        method=one.method,
        refit=one.refit,
        baseline=one.baseline,
        perplexity={name: math.exp(nats) for name, nats in found.nats.items()},
        ratio=math.exp(seen),
        unseen_ratio=None if unseen is None else math.exp(unseen),
        quality=math.exp(seen if unseen is None else (seen + unseen) / 2),
        kl=found.kl,
        agreement=found.agreement,
        experts=one.sizes.experts,
        top_k=one.sizes.top_k,
        expert_width=one.sizes.width,
        bytes=plan.bytes_output,
        size_ratio=plan.bytes_output / plan.bytes_dense,
        speeds=None,
        speed=None,
        seconds=seconds,
        command=command,
    )


def _timed(row: CutResult, one: CutCandidate, timing: CutTiming) -> CutResult:
    return replace(row, speeds=timing.speeds(one.sizes), speed=timing.speed(one.sizes))
