"""Times child processes and weighs their memory; the benchmarks' common part.

Linux counts the parent's resident set into a child's peak (the child shares it until it executes its program), so a
benchmark imports nothing heavy before it has measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

UPCYCLE = Path(sys.executable).with_name("upcycle")  # the console script that belongs to this interpreter
_VERDICT = {True: "PASS", False: "FAIL", None: ""}


@dataclass(frozen=True)
class Cost:
    """What one command took; ``peak_bytes`` is the resident set of the largest process in its tree."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Row:
    """One line of the table; ``passed`` is ``None`` for a line that is only information."""

    what: str
    ours: str
    theirs: str
    ratio: str
    target: str
    passed: bool | None = None


def run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> Cost:
    """Run a command to its end.

    What others have written is flushed first, so that nobody pays for somebody else's bytes.

    Raises:
        RuntimeError: it failed; the message has the end of its output.
    """
    os.sync()
    words = [str(word) for word in command]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
    ) as process:
        started = time.perf_counter()
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        end = output.decode(errors="replace")[-3000:]
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}:\n{end}")
    return Cost(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def alternate(rounds: int, ours: Callable[[], Cost], theirs: Callable[[], Cost]) -> tuple[list[Cost], list[Cost]]:
    """Run both sides in turn, so that a slow spell of the machine strikes both; every cost goes to stderr."""
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for number in range(1, rounds + 1):
        for side, command, found in (("upcycle", ours, costs[0]), ("other", theirs, costs[1])):
            cost = command()
            found.append(cost)
            print(f"round {number} {side}: {_seconds(cost.seconds)}, {mega(cost.peak_bytes)}", file=sys.stderr)
    return costs


def time_row(what: str, ours: list[Cost], theirs: list[Cost], most: float | None = None) -> Row:
    """Median wall times; passes when ours is at most ``most`` times theirs."""
    a, b = median(cost.seconds for cost in ours), median(cost.seconds for cost in theirs)
    passed = None if most is None else a / b <= most
    return Row(what, _seconds(a), _seconds(b), f"{a / b:.2f}x", f"at most {most:.2f}x" if most else "", passed)


def rate_row(what: str, ours: list[Cost], theirs: list[Cost], sizes: tuple[int, int], least: float) -> Row:
    """Bytes written (``sizes``) per second of median wall time; passes when ours is at least ``least`` times theirs."""
    a, b = (size / median(cost.seconds for cost in side) for size, side in zip(sizes, (ours, theirs), strict=True))
    cells = [f"{rate / 1e9:.2f} GB/s" for rate in (a, b)]
    return Row(what, cells[0], cells[1], f"{a / b:.2f}x", f"at least {least:.2f}x", a / b >= least)


def memory_row(what: str, ours: list[Cost], theirs: list[Cost], most: float | None = None) -> Row:
    """Median peak memory; passes when ours is at most ``most`` times theirs."""
    a, b = peak(ours), peak(theirs)
    passed = None if most is None else a / b <= most
    return Row(what, mega(a), mega(b), f"{a / b:.2f}x", f"at most {most:.2f}x" if most else "", passed)


def peak(costs: list[Cost]) -> float:
    """Median peak memory in bytes."""
    return median(cost.peak_bytes for cost in costs)


def spread_row(ours: list[Cost], theirs: list[Cost]) -> Row:
    """How noisy the times were: the slowest run above the fastest."""
    return Row("slowest above fastest", _spread(ours), _spread(theirs), "", "")


def report(title: str, headings: tuple[str, str], rows: Sequence[Row]) -> int:
    """Print the table, and what it was measured on; returns the exit code, 1 when a line failed."""
    lines = [("", *headings, "ratio", "target", "")]
    lines += [(row.what, row.ours, row.theirs, row.ratio, row.target, _VERDICT[row.passed]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(title)
    print(machine())
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return int(any(row.passed is False for row in rows))


def machine() -> str:
    """``2 processors, AVX512, torch 2.14.1``: said after measuring, since torch is imported for it."""
    import torch

    return f"{os.cpu_count()} processors, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def mega(count: float) -> str:
    """``411 MB``."""
    return f"{count / 1e6:,.0f} MB"


def _spread(costs: list[Cost]) -> str:
    return f"+{max(cost.seconds for cost in costs) / min(cost.seconds for cost in costs) - 1:.0%}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"
