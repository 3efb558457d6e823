"""Defines how long work reports its progress, without knowing about terminals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Progress:
    """Receives progress and ignores it; the command line's subclass draws bars.

    ``listens`` says whether anybody sees it: forecasts that take a second are made only then.
    """

    listens: bool = False

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[None]:
        """Begin a phase of ``total`` steps, which lasts until the ``with`` block ends."""
        yield

    def expect(self, phases: Mapping[str, float]) -> None:
        """Say how long the phases of the work that begins will take, in seconds by title and in order."""

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` of the current phase as done."""

    def note(self, message: str) -> None:
        """Pass on a message that the user should see."""

    def tell(self, message: str) -> None:
        """Pass on what is about to be done, and about how long it takes."""


SILENT = Progress()
