"""Commands of upcycle in a pseudo-terminal, as somebody at a keyboard runs them: what was printed, and when."""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from time import monotonic

ROWS, COLUMNS = 40, 100
QUESTION = re.compile(rb"\d/\d [^\n]*: *$")


@dataclass(frozen=True)
class Printed:
    """What one command printed.

    Attributes:
        blocks: bytes as they came, each with the seconds since the command began.
        status: the exit code.
    """

    blocks: Sequence[tuple[float, bytes]]
    status: int

    @property
    def text(self) -> str:
        """All of it, with its control characters."""
        return b"".join(block for _, block in self.blocks).decode("utf-8", "replace")


def in_terminal(
    command: str,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    answers: Sequence[str] = (),
    size: tuple[int, int] = (ROWS, COLUMNS),
    python: str = sys.executable,
) -> Printed:
    """Run ``upcycle ...`` in a terminal, and type the answers, one for each numbered question (``1/5 the model: ``).

    Args:
        command: it begins with ``upcycle``; words are divided at spaces.
        folder: where it runs.
        environment: what is set beside this process's own environment.
        answers: what is typed.
        size: rows and columns.
        python: the Python that has upcycle.

    Raises:
        AssertionError: it ended before it had asked for every answer.
    """
    keyboard, screen = pty.openpty()
    ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name != "CI"}
    told = {**inherited, "TERM": "xterm-256color", "COLUMNS": str(size[1]), **(environment or {})}
    process = subprocess.Popen(
        [python, "-P", "-m", "upcycle", *command.split()[1:]],
        cwd=folder,
        env=told,
        stdin=screen,
        stdout=screen,
        stderr=screen,
        close_fds=True,
    )
    os.close(screen)
    began, blocks, waiting = monotonic(), [], list(answers)
    while True:
        ready, _, _ = select.select([keyboard], [], [], 0.2)
        if ready:
            try:
                block = os.read(keyboard, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
            blocks.append((monotonic() - began, block))
            line = b"".join(block for _, block in blocks[-8:])
            if waiting and QUESTION.search(line):
                os.write(keyboard, (waiting.pop(0) + "\n").encode())
        elif process.poll() is not None:
            break
    os.close(keyboard)
    status = process.wait()
    assert not waiting, f"{command} did not ask for {waiting}"
    return Printed(blocks, status)
