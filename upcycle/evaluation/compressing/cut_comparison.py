"""The result of a comparison of compressions: its rows, which are recommended and why, and what a user must know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from upcycle.errors import UsageError
from upcycle.evaluation.frontier import pareto
from upcycle.notebook import HtmlShown
from upcycle.verification.verdict import MUCH_WORSE

_OTHER_WORDS = 0.5  # of what a model writes: below, it hardly writes what the uncut one does


@dataclass(frozen=True)
class CutResult:
    """Holds one row of the table.

    ``ratio`` is the geometric mean over the texts of kinds that were calibrated on of perplexity relative to the uncut model's,
    ``unseen_ratio`` that over the others (None where there are none), and ``quality`` the geometric mean of both, by which rows are
    ranked: less is better. ``kl`` is the mean KL(uncut || it) of next tokens in nats, ``agreement`` the share of the tokens it writes
    that are those of the uncut model. ``size_ratio`` is its bytes by the uncut model's. ``speeds`` are tokens per second relative to
    the uncut model's with the same kernels (``prefill`` and ``decode``, more is faster), and ``speed`` that of a whole request, either
    model with its faster kernels; None where nothing was timed. ``frontier``: no other row is smaller without losing more.
    ``reason`` and ``command`` are of recommended rows.
    """

    keep: float
    method: str
    refit: str
    baseline: bool
    perplexity: dict[str, float]
    ratio: float
    unseen_ratio: float | None
    quality: float
    kl: float
    agreement: float
    experts: int
    top_k: int
    expert_width: int
    bytes: int
    size_ratio: float
    speeds: dict[str, dict[str, float]] | None
    speed: float | None
    seconds: float
    frontier: bool = False
    recommended: bool = False
    reason: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class CutComparison(HtmlShown):
    """Holds the table, and the uncut model's perplexities. ``as_dict`` has the documented JSON keys.

    ``unseen`` names the texts of kinds that nothing was calibrated on. ``continuations`` is how many were compared, of
    ``continuation_tokens`` each. ``timing`` says how times were measured, with the uncut model's ``prefill_seconds`` and
    ``decode_seconds``; None where nothing was timed. ``goal`` is ``faster`` or ``within`` and its number; empty: the best at each
    size. ``warnings`` are what a user must know of the recommended rows.
    """

    source: str
    uncut: dict[str, float]
    uncut_bytes: int
    unseen: list[str]
    calibration: list[str]
    calibration_tokens: int
    evaluation_tokens: int
    continuations: int
    continuation_tokens: int
    observe_seconds: float
    results: list[CutResult]
    skipped: list[str]
    timing: dict[str, Any] | None
    goal: dict[str, float]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)

    @property
    def recommended(self) -> list[CutResult]:
        """The recommended rows: one for a goal, otherwise the best at each size."""
        return [row for row in self.results if row.recommended]


def ranked(rows: Sequence[CutResult]) -> list[CutResult]:
    """Return the rows by what they keep, the best first, with those on the frontier of quality against size marked.

    A row that is not smaller than the uncut model is never on it: the uncut model is better.
    """
    best = pareto([row for row in rows if row.size_ratio < 1], lambda row: row.bytes, lambda row: row.quality)
    marked = [replace(row, frontier=any(row is one for one in best)) for row in rows]
    return sorted(marked, key=lambda row: (-row.keep, row.quality))


def recommend_cuts(rows: Sequence[CutResult], faster: float | None, within: float | None) -> list[CutResult]:
    """Return the rows with the recommended ones marked, each with its reason; only they keep their command.

    Args:
        rows: all.
        faster: the best among those at least so many times as fast as the uncut model.
        within: the smallest among those whose quality is at most so much; neither: the best at each size.

    Raises:
        UsageError: no row meets the goal.
    """
    methods = [row for row in rows if not row.baseline]
    smaller = [row for row in methods if row.size_ratio < 1]
    if faster is not None:
        fast = [row for row in methods if row.speed is not None and row.speed >= faster]
        if not fast:
            best = max((row.speed for row in methods if row.speed is not None), default=0.0)
            raise UsageError(
                f"no compression is {faster:g}x as fast as the uncut model: the fastest is {best:.2f}x",
                hint="a smaller --faster, or keep less: --keep 0.5,0.25",
            )
        chosen = [min(fast, key=lambda row: row.quality)]
    elif within is not None:
        good = [row for row in smaller if row.quality <= within]
        if not good:
            best = min((row.quality for row in smaller), default=float("inf"))
            raise UsageError(
                f"no compression stays within {within:g}x of the uncut model's perplexity: the best is {best:.3f}x",
                hint="a larger --within, or keep more: --keep 0.9,0.75",
            )
        chosen = [min(good, key=lambda row: (row.bytes, row.quality))]
    else:
        at = {keep: [row for row in smaller if row.keep == keep] for keep in dict.fromkeys(row.keep for row in rows)}
        chosen = [min(group, key=lambda row: row.quality) for group in at.values() if group]
    found = []
    for row in rows:
        one = any(row is best for best in chosen)
        reason = _reason(row, rows, faster, within) if one else None
        found.append(replace(row, recommended=one, reason=reason, command=row.command if one else None))
    return found


def named(row: CutResult) -> str:
    """Return a row's method, and whether it was refitted."""
    return f"{row.method} without refit" if row.refit == "none" else f"{row.method} with refit"


def _reason(row: CutResult, rows: Sequence[CutResult], faster: float | None, within: float | None) -> str:
    """Return why a row is recommended, in numbers."""
    others = [
        one for one in rows if one.keep == row.keep and not one.baseline and one is not row and one.size_ratio < 1
    ]
    if faster is not None:
        why = f"loses least of those at least {faster:g}x as fast ({row.speed:.2f}x)"
    elif within is not None:
        why = f"the smallest within {within:g}x ({row.size_ratio:.0%} of the size)"
    else:
        why = f"loses least of {len(others) + 1} at {row.keep:.0%}"
    why += f": {row.quality:.3f}x"
    if row.unseen_ratio is not None:
        why += f" ({row.ratio:.3f}x on calibrated kinds of text, {row.unseen_ratio:.3f}x on another)"
    why += f", writes {row.agreement:.0%} of the same tokens"
    next_best = min(others, key=lambda one: one.quality, default=None)
    if next_best is not None:
        why += f"; next is {named(next_best)}, {next_best.quality:.3f}x"
    drawn = _drawn(row, rows)
    return why + (f"; random experts {drawn.quality:.3f}x" if drawn is not None else "")


def _drawn(row: CutResult, rows: Sequence[CutResult]) -> CutResult | None:
    """Return the better of the rows of random experts at the same size; None where there are none."""
    return min(
        (one for one in rows if one.baseline and one.keep == row.keep), key=lambda one: one.quality, default=None
    )


def concerns(rows: Sequence[CutResult]) -> list[str]:
    """Return what a user must know: where all lose much, where a recommended row is no better than chance, or writes other words."""
    notes = []
    for keep in dict.fromkeys(row.keep for row in rows):
        group = [
            r for r in rows if r.keep == keep and r.size_ratio < 1 and not r.baseline and r.unseen_ratio is not None
        ]
        least = min((row.unseen_ratio for row in group if row.unseen_ratio is not None), default=0.0)
        if least > MUCH_WORSE:
            notes.append(
                f"at {keep:.0%}, every compression loses much on text of a kind that was not calibrated on: {least:.2f}x at best; "
                "calibrate on every kind of text that the model will read, or keep more"
            )
    for row in (row for row in rows if row.recommended):
        where = f"{named(row)} at {row.keep:.0%}"
        drawn = _drawn(row, rows)
        if drawn is not None and drawn.quality <= row.quality and row.size_ratio == drawn.size_ratio:
            notes.append(f"{where} is no better than random experts: {row.quality:.3f}x against {drawn.quality:.3f}x")
        if row.unseen_ratio is not None and row.unseen_ratio > MUCH_WORSE * row.ratio:
            notes.append(
                f"{where} loses much more on text of a kind that was not calibrated on: {row.unseen_ratio:.2f}x against "
                f"{row.ratio:.2f}x; calibrate on text of more kinds"
            )
        if row.agreement < _OTHER_WORDS:
            notes.append(
                f"{where} writes other words than the uncut model: {row.agreement:.0%} of the same tokens; read what it writes, or "
                "train it further"
            )
    return notes
