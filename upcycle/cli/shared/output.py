"""The only module that prints: results on stdout, everything else on stderr.

Whatever is printed first goes through :mod:`upcycle.cli.shared.terminal_safe`, and never through rich's markup, so that a name in
square brackets stays a name. Colours are asked for with :func:`styled`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import IO, Any, TextIO

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from upcycle.cli.shared.terminal_safe import one_line, paragraph, prose
from upcycle.cli.shared.whole_time import WholeTime
from upcycle.errors import EnvironmentFault, UpcycleError
from upcycle.files.private_text import own_secrets, scrub, scrub_machine
from upcycle.formatting import duration
from upcycle.progress import Progress

_FILE_WIDTH = 160
LINE_SECONDS = 30.0  # between lines of progress in a log
VERDICT_STYLE = {"exact": "green", "approximate": "yellow", "broken": "red"}
Cell = str | Text
_said_in_json: list[bool] = []  # a JSON document is on stdout


def prepare_streams() -> None:
    """Make sure that all three standard streams exist, and that no character can end the command.

    A stream that was closed is opened on the null device. Otherwise the first file that is opened would get its number, and
    whatever a library prints would be written into that file. Characters that a stream's encoding lacks are replaced.
    """
    _said_in_json.clear()
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, _nowhere(number, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _nowhere(number: int, mode: str) -> IO[Any]:
    """Open the null device as the stream ``number``, or under another number where that one is in use for another file."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)
        os.set_inheritable(number, True)
        return os.fdopen(number, mode, encoding="utf-8", closefd=False)
    return os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8")


class _Console(Console):
    """Rich's console, which would end the program when its reader has gone; here :func:`_guarded` decides that."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def is_coloured() -> bool:
    """Whether stdout shows colours."""
    console = _console(sys.stdout)
    return console.is_terminal and not console.no_color and bool(console.color_system)


def stdout_width() -> int:
    """Return how many characters a line on stdout has room for."""
    return _console(sys.stdout).width


def _console(stream: TextIO) -> Console:
    # A file or pipe has no width; this one is wide enough that no table is folded.
    return _Console(
        file=stream, highlight=False, width=None if stream.isatty() else _FILE_WIDTH, soft_wrap=not stream.isatty()
    )


@contextmanager
def _guarded(stream: TextIO, stop: bool = False) -> Iterator[None]:
    """Run the printing in the ``with`` block. A reader that has gone (``| head -1``) neither ends the work nor changes its exit code.

    Args:
        stream: stdout or stderr.
        stop: raise when the reader has gone, because printing is all that the command does.

    Raises:
        BrokenPipeError: the reader has gone, and ``stop`` is set.
        EnvironmentFault: stdout cannot be written, for example because its disk is full.
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
                f"the result cannot be printed: {error.strerror}",
                hint="files that the command wrote are complete; free space where stdout goes",
            ) from None


def _silence(stream: TextIO) -> None:
    """Send everything that is written to a stream from now on, and all that it has buffered, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def flush_streams() -> None:
    """Print what the streams have buffered.

    Raises:
        EnvironmentFault: stdout cannot be written.
    """
    for stream in (sys.stderr, sys.stdout):
        with _guarded(stream):
            pass


def _print(stream: TextIO, *parts: Text, **how: Any) -> None:
    with _guarded(stream):
        # As one text: what is wrapped by words begins behind its tag.
        _console(stream).print(Text.assemble(*parts), **how)


def print_json(data: Any) -> None:
    """Print one JSON document on stdout, indented."""
    _said_in_json[:] = [True]
    with _guarded(sys.stdout):
        click.echo(_json(data, indent=2))


def print_json_error(error: UpcycleError) -> None:
    """Print an error as the JSON document on stdout, unless a result is there already: programs read one document, or lines."""
    if _said_in_json:
        return
    told = {"message": scrub(error.message), "hint": scrub(error.hint or "") or None, "exit_code": error.exit_code}
    print_json({"error": told})


def print_json_line(data: Any) -> None:
    """Print one JSON document on one line of stdout, for results that come one by one.

    Raises:
        BrokenPipeError: the reader has gone.
    """
    _said_in_json[:] = [True]
    with _guarded(sys.stdout, stop=True):
        click.echo(_json(data))


def _json(data: Any, **how: Any) -> str:
    # json.dumps escapes everything but ASCII, and of its control characters leaves DEL alone, which a terminal might obey.
    text = json.dumps(data, **how).replace("\x7f", "\\u007f")
    for secret in own_secrets():
        text = text.replace(json.dumps(secret)[1:-1], "***")
    return text


def print_markdown(text: str) -> None:
    """Print a document on stdout as it is, without characters that a terminal would obey."""
    with _guarded(sys.stdout):
        click.echo(prose(text))


def print_model_text(text: str, style: str = "") -> None:
    """Print what a model wrote on stdout at once, without a line end; ``style`` is one of rich's.

    Raises:
        BrokenPipeError: the reader has gone.
    """
    text = prose(text, "\n\t" if sys.stdout.isatty() else "\n\t\r")
    with _guarded(sys.stdout, stop=True):
        if style:
            _console(sys.stdout).print(Text(text, style=style), end="", soft_wrap=True)
        else:
            sys.stdout.write(text)


def styled(text: object, style: str) -> Text:
    """Return text in a colour, for :func:`print_table`, :func:`print_facts` and :func:`print_line`."""
    return Text(one_line(text), style=style)


def verdict(name: str, style: str, explanation: str) -> Text:
    """Return a verdict in its colour, followed by its reason."""
    return Text.assemble(styled(name, style), ": ", one_line(explanation))


def print_line(*parts: Cell, wrap: bool = True) -> None:
    """Print one line on stdout; ``wrap=False`` does not fold a long one, so that it can be copied."""
    _print(sys.stdout, Text.assemble(*map(_cell, parts)), soft_wrap=None if wrap else True)


def print_error(error: UpcycleError) -> None:
    """Print ``error: ...`` on stderr and, where there is a hint, an empty line and ``hint: ...``."""
    _print_tagged("error: ", "bold red", error.message)
    if error.hint:
        _print(sys.stderr, Text())
        _print_tagged("hint: ", "cyan", error.hint)


def print_traceback(error: BaseException) -> None:
    """Print an error's traceback on stderr, for a bug report: without tokens, home folder, user and host."""
    text = "".join(traceback.format_exception(error)).rstrip("\n")
    lines = (one_line(line) for line in scrub_machine(text).split("\n"))
    _print(sys.stderr, Text("\n".join(lines)), soft_wrap=True)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Cell]], right: Iterable[int] = (), title: str = ""
) -> None:
    """Print a plain table on stdout.

    Args:
        columns: the header.
        rows: as many cells as ``columns``, each.
        right: the numbers of the columns that are aligned right.
        title: a line above the table; one that begins with a line feed leaves an empty line before it.
    """
    if title.startswith("\n"):
        print_line()
    heading = Text(one_line(title.strip("\n"))) if title else None
    table = Table(title=heading, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(_cell(column), justify="right" if index in set(right) else "left")
    for row in rows:
        table.add_row(*map(_cell, row))
    with _guarded(sys.stdout):
        _console(sys.stdout).print(table)


def print_facts(facts: Iterable[tuple[str, Cell]]) -> None:
    """Print names and values on stdout, one pair a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(_cell(name), _cell(value))
    with _guarded(sys.stdout):
        _console(sys.stdout).print(table)


def _cell(value: Cell) -> Text:
    return value if isinstance(value, Text) else Text(one_line(value))


def warn(message: str) -> None:
    """Print ``warning: ...`` on stderr."""
    _print_tagged("warning: ", "yellow", message)


def note(message: str) -> None:
    """Print ``note: ...`` on stderr."""
    _print_tagged("note: ", "cyan", message)


def print_message(message: str) -> None:
    """Print a plain line on stderr."""
    _print_tagged("", "", message)


def _print_tagged(tag: str, style: str, message: str) -> None:
    _print(sys.stderr, Text(tag, style=style), Text(paragraph(scrub(message))))


@contextmanager
def working(title: str) -> Iterator[None]:
    """Show a spinner on stderr until the ``with`` block ends, where that is a terminal."""
    console = _console(sys.stderr)
    if not console.is_terminal or os.environ.get("CI") or os.environ.get("TQDM_DISABLE"):
        yield
        return
    with console.status(Text(one_line(title))):
        yield


class ProgressBars(Progress):
    """Draws a bar with the remaining time for each phase, on stderr; where that is no terminal, a line now and then.

    A log of a batch job, or a notebook's ``!upcycle``, has a line every :data:`LINE_SECONDS`, and nothing of phases that are
    shorter. ``TQDM_DISABLE`` turns both off. Where the phases were forecast, what is left is that of all of them together.
    """

    def __init__(self, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as RichProgress

        from upcycle.cli.shared.left_column import LeftColumn

        self._quiet, self.listens = quiet, not quiet
        off = quiet or bool(os.environ.get("TQDM_DISABLE"))
        drawn = not off and sys.stderr.isatty() and not os.environ.get("CI")
        title = TextColumn("{task.description}", markup=False)
        columns = SpinnerColumn(), title, BarColumn(bar_width=20), MofNCompleteColumn(), LeftColumn()
        self._bars = RichProgress(*columns, console=_console(sys.stderr), transient=True, disable=not drawn)
        self._task: Any = None
        self._lines = not off and not drawn
        self._title, self._done, self._total = "", 0, 0
        self._began = self._told = 0.0
        self._whole = WholeTime({})

    def expect(self, phases: Mapping[str, float]) -> None:
        """Take what is left from a forecast of all phases."""
        self._whole = WholeTime(phases)

    @contextmanager
    def phase(self, title: str, total: int) -> Iterator[None]:
        """Draw a bar of ``total`` steps until the ``with`` block ends."""
        self._title, self._done, self._total = title, 0, total
        self._began = self._told = monotonic()
        with self._bars:
            self._task = self._bars.add_task(one_line(title), total=total, left="")
            try:
                yield
            finally:
                self._bars.remove_task(self._task)
                self._whole.finish(title, monotonic() - self._began)

    def advance(self, steps: int = 1) -> None:
        """Move the bar by ``steps``."""
        self._done += steps
        now = monotonic()
        whole = self._whole.left(self._title, self._done / max(1, self._total), now - self._began)
        self._bars.update(self._task, advance=steps, left="" if whole is None else f"{duration(whole)} of all")
        if self._lines and now - self._told >= LINE_SECONDS and self._done < self._total:
            self._told = now
            left = duration((now - self._began) / self._done * (self._total - self._done))
            rest = f", of all {duration(whole)}" if whole is not None else ""
            print_message(f"{self._title}: {self._done:,} of {self._total:,}, about {left} left{rest}")

    def note(self, message: str) -> None:
        """Print a warning above the bar."""
        if not self._quiet:
            warn(message)

    def tell(self, message: str) -> None:
        """Print a note above the bar."""
        if not self._quiet:
            note(message)
