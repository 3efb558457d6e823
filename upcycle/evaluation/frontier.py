"""Chooses between conversions by what a user wants: the best quality at a speed, or the fastest at a quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from upcycle.errors import UsageError


class Measured(Protocol):
    """A conversion by its quality and its time, both relative to the dense model's: less is better."""

    @property
    def ratio(self) -> float:
        """Perplexity."""

    @property
    def time(self) -> float | None:
        """Time of a request; None where it was not measured."""


M = TypeVar("M", bound=Measured)
T = TypeVar("T")


def pareto(rows: Sequence[T], cost: Callable[[T], float], loss: Callable[[T], float]) -> list[T]:
    """Return the rows than which none is better in one measure and at least as good in the other, the cheapest first."""
    found: list[T] = []
    for row in sorted(rows, key=lambda row: (cost(row), loss(row))):
        if not found or loss(row) < loss(found[-1]):
            found.append(row)
    return found


def frontier(rows: Sequence[M]) -> list[M]:
    """Return :func:`pareto` of time and perplexity, the fastest first. Rows without a time are left out."""
    timed = [(row.time, row) for row in rows if row.time is not None]
    return [row for _, row in pareto(timed, lambda one: one[0], lambda one: one[1].ratio)]


def best_at_speed(rows: Sequence[M], faster: float) -> M:
    """Return the row of best quality among those at least ``faster`` times as fast as the dense model.

    Raises:
        UsageError: none is; the message says how fast the fastest one is.
    """
    fast = [row for row in rows if row.time is not None and row.time * faster <= 1]
    if not fast:
        quickest = min((row.time for row in rows if row.time is not None), default=None)
        best = "no row was timed" if quickest is None else f"the fastest is {1 / quickest:.2f}x"
        raise UsageError(
            f"no conversion is {faster:g}x as fast as the dense model: {best}",
            hint="a smaller --faster, or smaller fractions: --active 0.5,0.25,0.1",
        )
    return min(fast, key=lambda row: row.ratio)


def fastest_within(rows: Sequence[M], within: float) -> M:
    """Return the fastest row among those whose perplexity is at most ``within`` times the dense model's.

    Raises:
        UsageError: none is; the message says how good the best one is.
    """
    good = [row for row in rows if row.time is not None and row.ratio <= within]
    if not good:
        best = min((row.ratio for row in rows if row.time is not None), default=None)
        known = "no row was timed" if best is None else f"the best is {best:.3f}x"
        raise UsageError(
            f"no conversion stays within {within:g}x of the dense perplexity: {known}",
            hint="a larger --within, larger fractions (--active 0.9,0.75), or --refit blocks",
        )
    return min(good, key=lambda row: (row.time, row.ratio))
