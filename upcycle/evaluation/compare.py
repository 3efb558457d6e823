"""Compares ways to split one model at equal cost, and recommends one.

Two baselines are always included: **static pruning** to the same number of active neurons with the same refit (routing that does
not beat it is not worth its router) and **oracle routing** (which no router on that partition can surpass).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from upcycle.architectures.stock import load_tokenizer
from upcycle.calibration.neuron_importance import SHORTEST_PIECE
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.errors import EnvironmentFault, RefusalError, UsageError
from upcycle.evaluation.candidate_walk import Candidate, Texts, Walk, ratio
from upcycle.files.output.scratch import scratch
from upcycle.hardware.memory import available_memory
from upcycle.planning.cost import Plan
from upcycle.planning.expert_job import ExpertJob
from upcycle.planning.job import method_of
from upcycle.planning.prepare_experts import prepare_experts
from upcycle.progress import SILENT, Progress
from upcycle.recipe.conversion_recipe import parse_recipe
from upcycle.recipe.recipe_parts import CalibrationRecipe
from upcycle.registry import METHODS, ROUTERS, load
from upcycle.text.mixture import mixed_windows, read_texts
from upcycle.text.reading.plain_text import read_text

_VARIANTS = {"importance": ["variant=independent", "variant=sharing_inner", "variant=sharing_inter"]}


@dataclass(frozen=True)
class Result:
    """Holds one row of the table.

    ``ratio`` is the geometric mean over domains of perplexity relative to the dense model's. ``captured`` is the router's share of
    what an oracle's choices would contribute, averaged over layers.
    """

    active: float
    method: str
    router: str
    refit: str
    baseline: str | None
    perplexity: dict[str, float]
    ratio: float
    kl: float
    captured: float | None
    parameters_active: int
    flops_ratio: float
    seconds: float
    peak_memory_bytes: int
    recommended: bool
    command: str | None


@dataclass(frozen=True)
class Comparison:
    """Holds the table and the dense model's perplexities. ``as_dict`` has the documented JSON keys."""

    source: str
    dense: dict[str, float]
    calibration_tokens: int
    evaluation_tokens: int
    results: list[Result]
    skipped: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)

    def best(self, active: float) -> Result:
        """Return the recommended conversion at this fraction of active neurons."""
        return next(r for r in self.results if r.active == active and r.recommended)

    def baseline(self, active: float, name: str) -> Result:
        """Return the result of the baseline ``static`` or ``oracle``."""
        return next(r for r in self.results if r.active == active and r.baseline == name)


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
    pieces: int = 24,
    layers: str = "except-first:1",
    grid: str = "staged",
    seed: int = 0,
    progress: Progress = SILENT,
) -> Comparison:
    """Compare splitting methods, routers and refits on one model.

    Args:
        source: the dense model.
        methods: names, or ``name:key=value``; ``all`` takes every splitting method.
        routers: names; ``all`` takes every calibrated router and ``cool``.
        active: fractions of the FFN neurons that run per token, all layers together.
        calibration: texts to calibrate on; each is a domain.
        calibration_tokens: tokens to calibrate on.
        window: tokens per window.
        text: texts to measure on, one domain each; default: the last quarter of every calibration text.
        tokens: tokens to measure on, per domain.
        pieces: about how many experts an FFN is split into, shared ones included; see the recipe key.
        layers: the layers that are split (as the recipe key); the others stay dense. ``active`` counts the neurons of all layers.
        grid: ``staged`` tries all methods with the ridge router, then all routers and refits with the best method; ``full`` tries
            every combination.
        seed: seed of every random choice.
        progress: receives the progress.

    Raises:
        UsageError: a name is unknown, a fraction leaves nothing to choose from, or a text is too short.
    """
    active = list(dict.fromkeys(active))
    for fraction in active:
        if not 0 < fraction < 1:
            raise UsageError(f"active is a fraction between 0 and 1, got {fraction:g}", hint="--active 0.75,0.5,0.25")
    checkpoint = DenseCheckpoint.open(source, None)
    options = _Options(checkpoint, source, pieces, layers, seed, calibration, calibration_tokens, window)
    texts = _texts(checkpoint, calibration, calibration_tokens, min(window, _longest(checkpoint)), text, tokens)
    method_names, router_names = _methods(methods), _routers(routers)
    skipped: list[str] = []
    done: list[Candidate] = []
    with scratch("compare") as folder:

        def run(wanted: list[Candidate | None]) -> list[float]:
            known = {candidate.label for candidate in done}
            fresh = list({c.label: c for c in wanted if c is not None and c.label not in known}.values())
            nats = Walk(checkpoint, "keep", texts, folder, progress, _workers(fresh)).run(fresh)
            done.extend(fresh)
            return nats

        def candidate(fraction: float, method: str, router: str, refit: str, baseline: str | None = None) -> Any:
            return options.candidate(fraction, method, router, refit, skipped, baseline)

        first = "ridge" if "ridge" in router_names else router_names[0]
        all_routers, refits = (router_names, ("down", "none")) if grid == "full" else ([first], ("down",))
        dense = run([candidate(a, m, r, f) for a in active for m in method_names for r in all_routers for f in refits])
        last = []
        for fraction in active:
            best = _best([c for c in done if c.active == fraction], dense, fraction)
            method, router = _named(best)
            last += [candidate(fraction, method, name, "down") for name in router_names]
            last += [candidate(fraction, method, router, refit) for refit in ("scale", "none")]
            last += [candidate(fraction, method, router, "down", baseline) for baseline in ("static", "oracle")]
            last += [candidate(fraction, method, router, "none", baseline) for baseline in ("static", "oracle")]
            if "cmoe" in method_names and "representative" in router_names:
                last.append(candidate(fraction, "cmoe", "representative", "none"))
        run(last)
    results = _results(options, done, dense, texts)
    perplexity = dict(zip(texts.evaluation, map(math.exp, dense), strict=True))
    measured = sum(windows.numel() for windows in texts.evaluation.values())
    return Comparison(source, perplexity, texts.calibration.numel(), measured, results, skipped)


class _Options:
    """Makes candidates that cost the same."""

    def __init__(
        self,
        checkpoint: DenseCheckpoint,
        source: str,
        pieces: int,
        layers: str,
        seed: int,
        calibration: str | Sequence[str],
        tokens: int,
        window: int,
    ) -> None:
        self._checkpoint, self._source, self._seed = checkpoint, source, seed
        self._sizes = {"pieces": pieces, "layers": layers}
        self._calibration: dict[str, Any] = {"text": calibration, "tokens": tokens, "window": window}

    def recipe(self, active: float, method: str, router: str, refit: str) -> dict[str, Any]:
        """Return the recipe of one candidate, without its source."""
        name, _, assignments = method.partition(":")
        return {
            "method": name,
            "parameters": dict(part.split("=", 1) for part in assignments.split(";") if part),
            "active": active,
            **self._sizes,
            "shared_unheld": "route",
            "router": router,
            "refit": refit,
            "scale": "sum",
            "calibration": self._calibration,
            "seed": self._seed,
        }

    def candidate(
        self, active: float, method: str, router: str, refit: str, skipped: list[str], baseline: str | None = None
    ) -> Candidate | None:
        """Return a candidate; where the model cannot be split like that, add the reason to ``skipped`` and return None."""
        recipe = self.recipe(active, method, router, refit)
        label = f"{active:g} {method} {router} {refit} {baseline or ''}"
        try:
            job = self._job(recipe)
            if job.method.needs_gradients and self._calibration["tokens"] < SHORTEST_PIECE * job.shape.experts:
                raise UsageError(f"too little calibration text to divide it into {job.shape.experts} kinds")
            if job.method.name == "coactivation_graph":
                import pymetis  # noqa: F401 - only whether it is installed
        except (UsageError, RefusalError, EnvironmentFault, ImportError) as error:
            note = f"{method}: {getattr(error, 'message', 'pymetis is not installed')}"
            if note not in skipped:
                skipped.append(note)
            return None
        return Candidate(job, active, label, baseline)

    def _job(self, recipe: dict[str, Any]) -> Any:
        checkpoint = self._checkpoint
        parsed = parse_recipe({"source": self._source, **recipe}, "compare")
        dense = (checkpoint.family, checkpoint.config, checkpoint.store.specs, checkpoint.has_tokenizer)
        return prepare_experts(ExpertJob, parsed, method_of(parsed), *dense)

    def command(self, candidate: Candidate) -> str:
        """Return the command that converts as a candidate does."""
        recipe = candidate.job.recipe
        layers = recipe.layers if isinstance(recipe.layers, str) else ",".join(map(str, recipe.layers))
        words = ["upcycle", "convert", self._source, "OUT", "--method", recipe.method]
        words += [word for key, value in recipe.parameters.items() for word in ("--param", f"{key}={value}")]
        words += ["--active", f"{candidate.active:g}", "--pieces", str(recipe.pieces), "--layers", layers]
        words += ["--shared-unheld", "route", "--router", recipe.router.name, "--refit", recipe.refit, "--scale", "sum"]
        words += ["--calibration", ",".join(recipe.calibration.texts)]
        return shlex.join(words)


def _longest(checkpoint: DenseCheckpoint) -> int:
    return checkpoint.config.max_position_embeddings


def _texts(
    checkpoint: DenseCheckpoint,
    calibration: str | Sequence[str],
    calibration_tokens: int,
    window: int,
    text: Sequence[str],
    tokens: int,
) -> Texts:
    wanted = CalibrationRecipe(
        text=calibration if isinstance(calibration, str) else list(calibration), tokens=calibration_tokens
    )
    # The part of a text that is held out for verification must not decide which split is chosen, either.
    contents = read_texts(wanted)
    if text:
        measured = {name: read_text(name) for name in text}
    else:
        cuts = {name: content.find("\n", 3 * len(content) // 4) + 1 for name, content in contents.items()}
        measured = {name: content[cuts[name] :] for name, content in contents.items()}
        contents = {name: content[: cuts[name]] for name, content in contents.items()}
    tokenizer = load_tokenizer(checkpoint.source.path)
    evaluation = {name: mixed_windows({name: content}, tokenizer, tokens, window) for name, content in measured.items()}
    return Texts(mixed_windows(contents, tokenizer, calibration_tokens, window), evaluation)


def _methods(names: Sequence[str]) -> list[str]:
    if list(names) != ["all"]:
        for name in names:
            if load("method", name.partition(":")[0]).kind == "growth":
                raise UsageError(
                    f"{name} makes no experts from a dense FFN, so it cannot be compared", hint="--methods all"
                )
        return list(names)
    found = []
    for name in METHODS:
        if load("method", name).kind not in ("copies", "growth"):
            found += [f"{name}:{variant}" for variant in _VARIANTS.get(name, [])] or [name]
    return found


def _routers(names: Sequence[str]) -> list[str]:
    if list(names) != ["all"]:
        for name in names:
            load("router", name)
        return list(names)
    return [name for name in ROUTERS if load("router", name).calibrated] + ["cool"]


def _named(candidate: Candidate) -> tuple[str, str]:
    recipe = candidate.job.recipe
    parameters = ";".join(f"{key}={value}" for key, value in recipe.parameters.items())
    return f"{recipe.method}:{parameters}" if parameters else recipe.method, recipe.router.name


def _workers(candidates: Sequence[Candidate]) -> int:
    """Return how many candidates run at a time: one per thread, as far as half of the free memory has room for them."""
    largest = max((candidate.job.cost().peak_memory_bytes for candidate in candidates), default=1)
    return max(1, min(torch.get_num_threads(), len(candidates), available_memory() // 2 // largest))


def _best(candidates: list[Candidate], dense: Sequence[float], active: float) -> Candidate:
    storable = [c for c in candidates if c.baseline is None]
    if not storable:
        raise UsageError(f"no method can split this model with {active:g} of its neurons active", hint="--methods all")
    return min(storable, key=lambda candidate: ratio(candidate.nats, dense))


def _results(options: _Options, done: list[Candidate], dense: Sequence[float], texts: Texts) -> list[Result]:
    found = []
    for fraction in dict.fromkeys(c.active for c in done):
        mine = [c for c in done if c.active == fraction]
        best = _best(mine, dense, fraction)
        rows = [_result(options, candidate, dense, texts, candidate is best) for candidate in mine]
        found += sorted(rows, key=lambda row: row.ratio)
    return found


def _result(options: _Options, candidate: Candidate, dense: Sequence[float], texts: Texts, recommended: bool) -> Result:
    plan: Plan = candidate.job.cost()
    method, router = _named(candidate)
    captured = candidate.captured
    return Result(
        active=candidate.active,
        method="-" if candidate.baseline == "static" else method,
        router=candidate.baseline or router,
        refit=candidate.job.refit,
        baseline=candidate.baseline,
        perplexity=dict(zip(texts.evaluation, map(math.exp, candidate.nats), strict=True)),
        ratio=ratio(candidate.nats, dense),
        kl=candidate.kl,
        captured=sum(captured) / len(captured) if captured else None,
        parameters_active=plan.parameters_active,
        flops_ratio=plan.flops_per_token / plan.flops_per_token_dense,
        seconds=candidate.seconds,
        peak_memory_bytes=plan.peak_memory_bytes,
        recommended=recommended,
        command=options.command(candidate) if recommended else None,
    )
