"""The result of a comparison: its rows, and which of them is recommended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from upcycle.evaluation.candidate_walk import Candidate, Texts, ratio
from upcycle.evaluation.candidates import CandidateOptions, named_parts
from upcycle.evaluation.compare_times import Timing
from upcycle.evaluation.frontier import best_at_speed, fastest_within, frontier
from upcycle.notebook import HtmlShown
from upcycle.planning.cost import Plan


@dataclass(frozen=True)
class Result:
    """Holds one row of the table.

    ``ratio`` is the geometric mean over domains of perplexity relative to the dense model's, and ``unseen_ratio`` that over domains
    of kinds that were not calibrated on, which are not in ``ratio``; None where there are none. ``captured`` is the router's share of
    what an oracle's choices would contribute, averaged over layers. ``times`` has ``prefill`` and ``decode`` relative to the dense
    model's (less is faster), for each implementation of experts; ``time`` is that of a whole request with the fastest one, whose name
    is ``fastest``, and ``frontier`` says that no other row is better in time or ratio without being worse in the other.
    """

    active: float
    method: str
    router: str
    refit: str
    baseline: str | None
    perplexity: dict[str, float]
    ratio: float
    unseen_ratio: float | None
    kl: float
    captured: float | None
    parameters_active: int
    flops_ratio: float
    seconds: float
    peak_memory_bytes: int
    times: dict[str, dict[str, float]] | None
    time: float | None
    fastest: str | None
    frontier: bool
    recommended: bool
    command: str | None


@dataclass(frozen=True)
class Comparison(HtmlShown):
    """Holds the table and the dense model's perplexities. ``as_dict`` has the documented JSON keys.

    ``unseen`` names the domains of embedded text, of whose kind nothing was calibrated on.

    ``timing`` says how times were measured: ``device``, ``instructions``, ``threads``, ``clock`` (``process_time`` or
    ``perf_counter``), ``batch``, ``prompt_tokens``, ``generated_tokens``, and the dense model's ``prefill_seconds`` and
    ``decode_seconds``; None where nothing was timed. ``goal`` is what was asked for: ``faster`` or ``within`` and its number; empty:
    the best at each fraction.
    """

    source: str
    dense: dict[str, float]
    unseen: list[str]
    calibration_tokens: int
    evaluation_tokens: int
    results: list[Result]
    skipped: list[str]
    timing: dict[str, Any] | None
    goal: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)

    def best(self, active: float) -> Result:
        """Return the conversion of best quality at this fraction of active neurons."""
        return min((r for r in self.results if r.active == active and r.baseline is None), key=lambda row: row.ratio)

    @property
    def recommended(self) -> list[Result]:
        """The recommended conversions: one for a goal, otherwise the best at each fraction."""
        return [row for row in self.results if row.recommended]

    def baseline(self, active: float, name: str) -> Result:
        """Return the result of the baseline ``static`` or ``oracle``."""
        return next(r for r in self.results if r.active == active and r.baseline == name)


def rows_of(
    options: CandidateOptions, done: Sequence[Candidate], dense: Sequence[float], texts: Texts, timing: Timing | None
) -> list[Result]:
    """Return a row for every candidate: by fraction, the best quality first."""
    found = []
    for fraction in dict.fromkeys(c.active for c in done):
        mine = [_row(options, candidate, dense, texts, timing) for candidate in done if candidate.active == fraction]
        found += sorted(mine, key=lambda row: row.ratio)
    best = frontier([row for row in found if row.baseline != "oracle"])  # which nobody can run
    return [replace(row, frontier=any(row is other for other in best)) for row in found]


def recommend(rows: Sequence[Result], faster: float | None, within: float | None) -> list[Result]:
    """Return the rows with those that are recommended marked; only they keep their command.

    Raises:
        UsageError: no row meets the goal.
    """
    storable = [row for row in rows if row.baseline is None]
    if faster is not None:
        chosen = [best_at_speed(storable, faster)]
    elif within is not None:
        chosen = [fastest_within(storable, within)]
    else:
        chosen = [best_quality(storable, fraction) for fraction in dict.fromkeys(row.active for row in rows)]
    marked = [replace(row, recommended=any(row is one for one in chosen)) for row in rows]
    return [row if row.recommended else replace(row, command=None) for row in marked]


def best_quality(rows: Sequence[Result], active: float) -> Result:
    """Return the row of least perplexity at one fraction."""
    return min((row for row in rows if row.active == active), key=lambda row: row.ratio)


def _row(
    options: CandidateOptions, candidate: Candidate, dense: Sequence[float], texts: Texts, timing: Timing | None
) -> Result:
    plan: Plan = candidate.job.cost()
    method, router = named_parts(candidate)
    captured, seen = candidate.captured, texts.seen
    requests = timing.requests(candidate) if timing else {}
    fastest = min(requests, key=requests.__getitem__, default=None)
    return Result(
        active=candidate.active,
        method="-" if candidate.baseline == "static" else method,
        router=candidate.baseline or router,
        refit=candidate.job.refit,
        baseline=candidate.baseline,
        perplexity=dict(zip(texts.evaluation, map(math.exp, candidate.nats), strict=True)),
        ratio=ratio(candidate.nats[:seen], dense[:seen]),
        unseen_ratio=ratio(candidate.nats[seen:], dense[seen:]) if texts.unseen else None,
        kl=candidate.kl,
        captured=sum(captured) / len(captured) if captured else None,
        parameters_active=plan.parameters_active,
        flops_ratio=plan.flops_per_token / plan.flops_per_token_dense,
        seconds=candidate.seconds,
        peak_memory_bytes=plan.peak_memory_bytes,
        times=timing.times(candidate) if timing else None,
        time=None if fastest is None else requests[fastest],
        fastest=fastest,
        frontier=False,
        recommended=False,
        command=options.command(candidate) if candidate.baseline is None else None,
    )
