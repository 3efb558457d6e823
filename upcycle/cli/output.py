"""The only place that prints: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import click
from rich.console import Console
from rich.table import Table

from upcycle.errors import UpcycleError
from upcycle.progress import Progress

_FILE_WIDTH = 160
VERDICT_STYLE = {"exact": "green", "approximate": "yellow", "broken": "red"}


def stdout() -> Console:
    """For results."""
    return _console(sys.stdout)


def stderr() -> Console:
    """For everything else."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    # A file or pipe has no width of its own: wide enough that no table is folded.
    return Console(
        file=stream, highlight=False, width=None if stream.isatty() else _FILE_WIDTH, soft_wrap=not stream.isatty()
    )


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(data, indent=2))


def print_json_line(data: Any) -> None:
    """One JSON document on one line of stdout, for results that come one by one."""
    click.echo(json.dumps(data))
    sys.stdout.flush()


def write(text: str) -> None:
    """Text on stdout as it is, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_error(error: UpcycleError) -> None:
    """``error: ...``, an empty line, ``hint: ...``."""
    console = stderr()
    console.print("error: ", style="bold red", end="")
    console.print(error.message, markup=False)
    if error.hint:
        console.print()
        console.print("hint: ", style="cyan", end="")
        console.print(error.hint, markup=False)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = (), title: str = ""
) -> None:
    """A plain table on stdout; columns whose number is in ``right`` are aligned right."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in set(right) else "left")
    for row in rows:
        table.add_row(*row)
    stdout().print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Name and value, one pair a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    stdout().print(table)


def warn(message: str) -> None:
    """One warning line on stderr."""
    console = stderr()
    console.print("warning: ", style="yellow", end="")
    console.print(message, markup=False)


def note(message: str) -> None:
    """One line on stderr that is no warning."""
    console = stderr()
    console.print("note: ", style="cyan", end="")
    console.print(message, markup=False)


def say(message: str) -> None:
    """One plain line on stderr, as it happens."""
    stderr().print(message, markup=False)


class Bars(Progress):
    """One bar with an ETA per phase, on stderr; silent when nobody watches."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._quiet = quiet
        off = quiet or not sys.stderr.isatty() or bool(os.environ.get("CI") or os.environ.get("TQDM_DISABLE"))
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bars = RichProgress(*columns, console=stderr(), transient=True, disable=off)
        self._task: Any = None

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[None]:
        """Show a bar while the phase lasts."""
        with self._bars:
            self._task = self._bars.add_task(title, total=total)
            try:
                yield
            finally:
                self._bars.remove_task(self._task)

    def advance(self, steps: int = 1) -> None:
        """Move the bar."""
        self._bars.advance(self._task, steps)

    def note(self, message: str) -> None:
        """A warning above the bar."""
        if not self._quiet:
            warn(message)
