"""Estimates when work of several phases ends, from a forecast of each and from how the finished ones compared with theirs."""

from __future__ import annotations

from collections.abc import Mapping

_TRUSTED = 0.02  # the part of the forecast that must have passed before its error is corrected


class WholeTime:
    """Follows work whose phases were forecast.

    A phase's own pace says nothing about those behind it: a phase of a hundred short steps would promise minutes too few. So what is
    left is what was forecast for the rest, times how much longer than forecast everything so far took.

    Args:
        expected: seconds by the title of each phase, in order; empty: nothing is known.
    """

    def __init__(self, expected: Mapping[str, float]) -> None:
        self._expected = dict(expected)
        self._forecast = self._took = 0.0  # of what was done so far
        self._first: tuple[str, float, float] = (
            "",
            0.0,
            0.0,
        )  # what was done of the phase that runs when it was first heard of

    def finish(self, title: str, seconds: float) -> None:
        """Take note that a phase took so long; phases before it that never began are dropped."""
        if title not in self._expected:
            return
        for name in list(self._expected):
            forecast = self._expected.pop(name)
            if name == title:
                before, spent = self._first[1:] if self._first[0] == title else (0.0, 0.0)
                self._forecast += (1 - before) * forecast
                self._took += seconds - spent
                return

    def left(self, title: str, done: float, seconds: float) -> float | None:
        """Return the seconds that are left of all phases; None where this one was not forecast.

        Args:
            title: of the phase that runs.
            done: the part of its steps that is done, by a run before this one, too.
            seconds: how long it has run.
        """
        if title not in self._expected:
            return None
        if self._first[0] != title:
            self._first = (title, done, seconds)
        _, before, spent = self._first
        names = list(self._expected)
        ahead = sum(self._expected[name] for name in names[names.index(title) :])
        rest = ahead - done * self._expected[title]
        passed = self._forecast + (done - before) * self._expected[title]
        if passed < _TRUSTED * (self._forecast + ahead):
            return rest
        return rest * (self._took + seconds - spent) / passed
