"""How long work reports that it is alive, without knowing about terminals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Reports nothing. The command line's subclass draws bars."""

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[None]:
        """Work of ``total`` steps begins."""
        yield

    def advance(self, steps: int = 1) -> None:
        """Some steps of the current phase are done."""

    def note(self, message: str) -> None:
        """Something the user should know."""


SILENT = Progress()
