"""The only place that prints: data on stdout, everything else on stderr.

Whatever is printed goes through :mod:`upcycle.cli.shared.visible` first and never through rich's markup: a name is a name.
Colours are asked for with :func:`styled`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, TextIO

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from upcycle.cli.shared.visible import one_line, paragraph, prose
from upcycle.errors import EnvironmentFault, UpcycleError
from upcycle.files.private_text import own_secrets, scrub, scrub_machine
from upcycle.progress import Progress

_FILE_WIDTH = 160
VERDICT_STYLE = {"exact": "green", "approximate": "yellow", "broken": "red"}
Cell = str | Text


def prepare_streams() -> None:
    """Make sure that there are three standard streams, and that no character ends the command.

    A stream that was closed leads nowhere; else the first file that is opened would get its number, and what a library prints
    would be written into it. What an encoding lacks is replaced.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, _nowhere(number, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _nowhere(number: int, mode: str) -> IO[Any]:
    try:
        os.fstat(number)  # in use for something else by now
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)
        os.set_inheritable(number, True)
        return os.fdopen(number, mode, encoding="utf-8", closefd=False)
    return os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8")


class _Console(Console):
    """Rich's, which ends the program where its reader has gone; here that is :func:`_while_read`'s to decide."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def is_coloured() -> bool:
    """Whether stdout shows colours."""
    console = _console(sys.stdout)
    return console.is_terminal and not console.no_color and bool(console.color_system)


def _console(stream: TextIO) -> Console:
    # A file or pipe has no width of its own: wide enough that no table is folded.
    return _Console(
        file=stream, highlight=False, width=None if stream.isatty() else _FILE_WIDTH, soft_wrap=not stream.isatty()
    )


@contextmanager
def _while_read(stream: TextIO, stop: bool = False) -> Iterator[None]:
    """Print in here. A reader that has gone (``| head -1``) gets no more, and changes neither the work nor its exit code.

    Args:
        stream: stdout or stderr.
        stop: there is no work but the printing.

    Raises:
        BrokenPipeError: the reader has gone, and ``stop``.
        EnvironmentFault: stdout takes nothing: its disk is full.
    """
    try:
        yield
        stream.flush()
    except BrokenPipeError:
        _silence(stream)
        if stop:
            raise
    except OSError as error:
        _silence(stream)
        if stream is sys.stdout:
            raise EnvironmentFault(
                f"the result cannot be printed: {error.strerror}", hint="what was made is made: give stdout room"
            ) from None


def _silence(stream: TextIO) -> None:
    """Let everything that is still written to a stream vanish, also what it holds back."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def flush_streams() -> None:
    """Print what is still held back.

    Raises:
        EnvironmentFault: stdout takes nothing.
    """
    for stream in (sys.stderr, sys.stdout):
        with _while_read(stream):
            pass


def _print(stream: TextIO, *parts: Text, **how: Any) -> None:
    with _while_read(stream):
        console = _console(stream)
        for part in parts[:-1]:
            console.print(part, end="")
        console.print(*parts[-1:], **how)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    with _while_read(sys.stdout):
        click.echo(_json(data, indent=2))


def print_json_line(data: Any) -> None:
    """One JSON document on one line of stdout, for results that come one by one.

    Raises:
        BrokenPipeError: nobody reads them any more.
    """
    with _while_read(sys.stdout, stop=True):
        click.echo(_json(data))


def _json(data: Any, **how: Any) -> str:
    # ASCII, but for the one control character that JSON need not escape; it can stand in strings alone.
    text = json.dumps(data, **how).replace("\x7f", "\\u007f")
    for secret in own_secrets():
        text = text.replace(json.dumps(secret)[1:-1], "***")
    return text


def print_markdown(text: str) -> None:
    """A document on stdout, as it is but for what a terminal would obey."""
    with _while_read(sys.stdout):
        click.echo(prose(text))


def write(text: str, style: str = "") -> None:
    """What a model wrote, on stdout, at once; where it is shown in colours, ``style`` is one of rich's.

    Raises:
        BrokenPipeError: nobody reads it any more.
    """
    text = prose(text, "\n\t" if sys.stdout.isatty() else "\n\t\r")
    with _while_read(sys.stdout, stop=True):
        if style:
            _console(sys.stdout).print(Text(text, style=style), end="", soft_wrap=True)
        else:
            sys.stdout.write(text)


def styled(text: object, style: str) -> Text:
    """Text in a colour, for :func:`print_table`, :func:`print_facts` and :func:`show`."""
    return Text(one_line(text), style=style)


def verdict(name: str, style: str, explanation: str) -> Text:
    """A verdict in its colour, and why."""
    return Text.assemble(styled(name, style), ": ", one_line(explanation))


def show(*parts: Cell, wrap: bool = True) -> None:
    """Parts of one line on stdout; ``wrap=False`` leaves one that is too long as it is, to be copied."""
    _print(sys.stdout, Text.assemble(*map(_cell, parts)), soft_wrap=None if wrap else True)


def print_error(error: UpcycleError) -> None:
    """``error: ...``, an empty line, ``hint: ...``."""
    _said("error: ", "bold red", error.message)
    if error.hint:
        _print(sys.stderr, Text())
        _said("hint: ", "cyan", error.hint)


def print_traceback(error: BaseException) -> None:
    """Where an error came from, on stderr, to be pasted into a bug report: without tokens, home folder, user and host."""
    text = "".join(traceback.format_exception(error)).rstrip("\n")
    lines = (one_line(line) for line in scrub_machine(text).split("\n"))
    _print(sys.stderr, Text("\n".join(lines)), soft_wrap=True)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Cell]], right: Iterable[int] = (), title: str = ""
) -> None:
    """A plain table on stdout; columns whose number is in ``right`` are aligned right."""
    if title.startswith("\n"):  # a line between two tables
        show()
    heading = Text(one_line(title.strip("\n"))) if title else None
    table = Table(title=heading, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(_cell(column), justify="right" if index in set(right) else "left")
    for row in rows:
        table.add_row(*map(_cell, row))
    with _while_read(sys.stdout):
        _console(sys.stdout).print(table)


def print_facts(facts: Iterable[tuple[str, Cell]]) -> None:
    """Name and value, one pair a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(_cell(name), _cell(value))
    with _while_read(sys.stdout):
        _console(sys.stdout).print(table)


def _cell(value: Cell) -> Text:
    return value if isinstance(value, Text) else Text(one_line(value))


def warn(message: str) -> None:
    """One warning line on stderr."""
    _said("warning: ", "yellow", message)


def note(message: str) -> None:
    """One line on stderr that is no warning."""
    _said("note: ", "cyan", message)


def say(message: str) -> None:
    """One plain line on stderr, as it happens."""
    _said("", "", message)


def _said(kind: str, style: str, message: str) -> None:
    _print(sys.stderr, Text(kind, style=style), Text(paragraph(scrub(message))))


class Bars(Progress):
    """One bar with an ETA per phase, on stderr; silent when nobody watches."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._quiet = quiet
        off = quiet or not sys.stderr.isatty() or bool(os.environ.get("CI") or os.environ.get("TQDM_DISABLE"))
        title = TextColumn("{task.description}", markup=False)
        columns = title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bars = RichProgress(*columns, console=_console(sys.stderr), transient=True, disable=off)
        self._task: Any = None

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[None]:
        """Show a bar while the phase lasts."""
        with self._bars:
            self._task = self._bars.add_task(one_line(title), total=total)
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
