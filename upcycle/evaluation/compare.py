"""Compares ways to split one model at equal cost, and recommends one.

Two baselines are always included: **static pruning** to the same number of active neurons with the same refit (routing that does
not beat it is not worth its router) and **oracle routing** (which no router on that partition can surpass).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from upcycle.architectures.stock import load_tokenizer
from upcycle.calibration.own_text import with_own_text
from upcycle.calibration.read_tokens import tokens_of
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.errors import UsageError
from upcycle.evaluation.candidate_walk import Candidate, Texts, Walk, ratio
from upcycle.evaluation.candidates import CandidateOptions, method_names, named_parts, router_names
from upcycle.evaluation.compare_times import time_candidates
from upcycle.evaluation.comparison import Comparison, recommend, rows_of
from upcycle.evaluation.timed_dtype import AUTO, timed_dtype
from upcycle.files.names import WRITTEN
from upcycle.files.output.scratch import scratch
from upcycle.hardware.memory import available_memory
from upcycle.notebook import IN_NOTEBOOKS
from upcycle.planning.job import check_calibrates
from upcycle.progress import Progress
from upcycle.recipe.recipe_parts import CalibrationRecipe
from upcycle.text.held_out import FLATTERING, seen_share, sketch
from upcycle.text.mixture import mixed_windows, read_texts
from upcycle.text.reading.plain_text import DEMO_TEXTS, EVERYDAY, read_text


def compare(
    source: str,
    *,
    methods: Sequence[str] = ("all",),
    routers: Sequence[str] = ("all",),
    active: Sequence[float] = (0.75, 0.5, 0.25),
    calibration: str | Sequence[str] = "demo",
    calibration_tokens: int = 6144,
    window: int = 256,
    text: Sequence[str] = (),
    tokens: int = 2048,
    pieces: int = 12,
    layers: str = "except-first:1",
    grid: str = "staged",
    faster: float | None = None,
    within: float | None = None,
    batch: int = 1,
    timed: bool = True,
    dtype: str = AUTO,
    seed: int = 0,
    progress: Progress = IN_NOTEBOOKS,
) -> Comparison:
    """Compare splitting methods, routers and refits on one model.

    Args:
        source: the dense model.
        methods: names, or ``name:key=value``; ``all`` takes every splitting method.
        routers: names; ``all`` takes every calibrated router and ``cool``.
        active: fractions of the FFN neurons that run per token, all layers together.
        calibration: texts to calibrate on; each is a domain. ``self`` is text that the model writes itself.
        calibration_tokens: tokens to calibrate on.
        window: tokens per window.
        text: texts to measure on, one domain each; default: the last quarter of every calibration text, or the embedded ones where
            the model writes all of it.
        tokens: tokens to measure on, per domain.
        pieces: about how many experts an FFN is split into, shared ones included; see the recipe key.
        layers: the layers that are split (as the recipe key); the others stay dense. ``active`` counts the neurons of all layers.
        grid: ``staged`` tries all methods with the ridge router, then all routers and refits with the best method; ``full`` tries
            every combination.
        faster: recommend the best quality among the conversions at least so many times as fast as the dense model.
        within: recommend the fastest among those whose perplexity is at most so many times the dense model's.
        batch: sequences at a time, where speed is measured.
        timed: measure speed: models of the candidates' shapes with random weights, beside the dense one.
        dtype: in which speed is measured; ``auto``: the stored one where this CPU multiplies it natively, else fp32.
        seed: seed of every random choice.
        progress: receives the progress.

    Raises:
        UsageError: a name is unknown, a fraction leaves nothing to choose from, a text is too short, or no candidate meets the goal.
    """
    active = list(dict.fromkeys(active))
    for fraction in active:
        if not 0 < fraction < 1:
            raise UsageError(f"active is a fraction between 0 and 1, got {fraction:g}", hint="--active 0.75,0.5,0.25")
    check_goal(faster, within, timed)
    checkpoint = DenseCheckpoint.open(source, None)
    check_calibrates(checkpoint.family, "compare")
    computed = timed_dtype(dtype, checkpoint.raw_config)
    if not checkpoint.has_tokenizer:
        raise UsageError(
            f"{source} has no tokenizer, and a comparison reads text", hint="put its files beside the weights"
        )
    options = CandidateOptions(checkpoint, source, pieces, layers, seed, calibration, calibration_tokens, window)
    splitting, routing = method_names(methods), router_names(routers)
    skipped: list[str] = []
    done: list[Candidate] = []
    importance: dict[int, dict[int, torch.Tensor]] = {}
    with scratch("compare") as folder:
        sizes = (calibration_tokens, min(window, _longest(checkpoint)), tokens)
        texts = _texts(checkpoint, calibration, text, sizes, seed, folder, progress)

        def run(wanted: list[Candidate | None]) -> list[float]:
            known = {candidate.label for candidate in done}
            fresh = list({c.label: c for c in wanted if c is not None and c.label not in known}.values())
            nats = Walk(checkpoint, "keep", texts, folder, progress, _workers(fresh), importance).run(fresh)
            done.extend(fresh)
            return nats

        def candidate(fraction: float, method: str, router: str, refit: str, baseline: str | None = None) -> Any:
            return options.candidate(fraction, method, router, refit, skipped, baseline)

        first = "ridge" if "ridge" in routing else routing[0]
        all_routers, refits = (routing, ("down", "none")) if grid == "full" else ([first], ("down",))
        tried = [candidate(a, m, r, f) for a in active for m in splitting for r in all_routers for f in refits]
        possible = list(dict.fromkeys(one.active for one in tried if one is not None))
        if not possible:
            raise UsageError(
                f"no method can split this model with {' or '.join(f'{a:g}' for a in active)} of its neurons active",
                hint=skipped[0] if skipped else "--methods all",
            )
        dense = run(tried)
        last = []
        for fraction in possible:
            best = _best([c for c in done if c.active == fraction], dense, texts.seen)
            method, router = named_parts(best)
            last += [candidate(fraction, method, name, "down") for name in routing]
            last += [candidate(fraction, method, router, refit) for refit in ("blocks", "scale", "none")]
            last += [candidate(fraction, method, router, "down", baseline) for baseline in ("static", "oracle")]
            last += [candidate(fraction, method, router, "none", baseline) for baseline in ("static", "oracle")]
            if "cmoe" in splitting and "representative" in routing:
                last.append(candidate(fraction, "cmoe", "representative", "none"))
        run(last)
    timing = time_candidates(checkpoint, done, batch, progress, dtype=computed) if timed else None
    results = recommend(rows_of(options, done, dense, texts, timing), faster, within)
    perplexity = dict(zip(texts.evaluation, map(math.exp, dense), strict=True))
    measured = sum(windows.numel() for windows in texts.evaluation.values())
    goal = {key: value for key, value in (("faster", faster), ("within", within)) if value is not None}
    about = timing.about if timing else None
    unseen = list(texts.unseen)
    return Comparison(source, perplexity, unseen, texts.calibration.numel(), measured, results, skipped, about, goal)


def check_goal(faster: float | None, within: float | None, timed: bool) -> None:
    """Refuse goals that exclude each other or cannot be met."""
    if faster is not None and within is not None:
        raise UsageError("--faster and --within are two goals", hint="one of --faster 1.25 and --within 1.10")
    if faster is not None and not faster > 1:
        raise UsageError(f"--faster is a factor above 1, got {faster:g}", hint="--faster 1.25")
    if within is not None and not within > 1:
        raise UsageError(f"--within is a factor above 1, got {within:g}", hint="--within 1.10")
    if (faster or within) and not timed:
        raise UsageError("a goal needs times, and they were left out", hint="leave --no-time out")


def _longest(checkpoint: DenseCheckpoint) -> int:
    return checkpoint.config.max_position_embeddings


def _texts(
    checkpoint: DenseCheckpoint,
    calibration: str | Sequence[str],
    text: Sequence[str],
    sizes: tuple[int, int, int],
    seed: int,
    folder: Path,
    progress: Progress,
) -> Texts:
    """Return the tokens to calibrate on, and those to measure on: of ``sizes`` in all, per window, and per domain."""
    calibration_tokens, window, tokens = sizes
    wanted = CalibrationRecipe(
        text=calibration if isinstance(calibration, str) else list(calibration), tokens=calibration_tokens
    )
    # The part of a text that is held out for verification must not decide which split is chosen, either.
    contents = read_texts(wanted)
    if text or not contents:  # nothing is measured on text that the model wrote itself
        measured = {name: read_text(name) for name in text or DEMO_TEXTS}
    else:
        cuts = {name: content.find("\n", 3 * len(content) // 4) + 1 for name, content in contents.items()}
        measured = {name: content[cuts[name] :] for name, content in contents.items()}
        contents = {name: content[: cuts[name]] for name, content in contents.items()}
    # The embedded texts stand for all that the model will read and was not calibrated on, if no lines of theirs were.
    lines = sketch(contents.values())
    others = {name: read_text(name) for name in (*DEMO_TEXTS, EVERYDAY) if name not in measured}
    others = {name: content for name, content in others.items() if seen_share(content, lines) <= FLATTERING}
    measured |= others
    tokenizer = load_tokenizer(checkpoint.source.path)
    evaluation = {name: mixed_windows({name: content}, tokenizer, tokens, window) for name, content in measured.items()}
    windows, own = tokens_of(wanted, contents, window, tokenizer, checkpoint, seed)
    if own:
        windows, _ = with_own_text(own, windows, checkpoint.source.path, folder / WRITTEN, progress)
    assert windows is not None
    return Texts(windows, evaluation, tuple(others))


def _workers(candidates: Sequence[Candidate]) -> int:
    """Return how many candidates run at a time: one per thread, as far as half of the free memory has room for them."""
    largest = max((candidate.job.cost().peak_memory_bytes for candidate in candidates), default=1)
    return max(1, min(torch.get_num_threads(), len(candidates), available_memory() // 2 // largest))


def _best(candidates: list[Candidate], dense: Sequence[float], seen: int) -> Candidate:
    storable = [c for c in candidates if c.baseline is None]
    return min(storable, key=lambda candidate: ratio(candidate.nats[:seen], dense[:seen]))
