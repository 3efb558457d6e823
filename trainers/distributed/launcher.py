"""Starts ranks on this machine, passes signals on to them, and waits for them.

:mod:`upcycle.trainers.distributed.hosts` does the same on several machines.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

from upcycle.hardware.child_processes import run_module, safe_environment
from upcycle.trainers.distributed.signals import INTERRUPTED, LAUNCHER, TOGETHER, give_back, take
from upcycle.trainers.distributed.told_once import telling_once

COMMAND = "UPCYCLE_COMMAND"  # in a rank's environment: the command that started all of them
_MODULE = "upcycle.cli.main"
_GRACE = 600.0  # seconds for the others to save, once one has stopped
_AFTER_FAILURE = 15.0  # seconds for the others to print their own errors, once one has failed
_LAST_WORDS = 1.0  # seconds between SIGTERM and SIGKILL


class Started(Protocol):
    """A process that was started: a rank, or the agent that starts the ranks of a machine."""

    def code(self) -> int | None:
        """Its exit code as a shell gives it (128 + n after signal n), or ``None`` while it runs."""

    def send(self, number: int) -> None:
        """Send it a signal."""

    def kill(self) -> None:
        """Kill it and all that it started, and wait for its end."""


class Local:
    """A process on this machine, in a session of its own: so a terminal's Ctrl-C reaches it once, through :meth:`send`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], control: bool = False) -> None:
        """``control``: give it a pipe as standard input, which is ``process.stdin`` here."""
        self.process = subprocess.Popen(
            command,
            env=safe_environment(environment) | {LAUNCHER: str(os.getpid())},
            stdin=subprocess.PIPE if control else subprocess.DEVNULL,
            start_new_session=True,
        )

    def code(self) -> int | None:
        """See :class:`Started`."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    def send(self, number: int) -> None:
        """See :class:`Started`."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """See :class:`Started`."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def launch_ranks(arguments: Sequence[str], nproc: int) -> int:
    """Run ``upcycle ARGUMENTS`` as ``nproc`` ranks on this machine; returns the exit code that :func:`wait` gives."""
    place = {"WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    with telling_once() as shared:
        return wait(start_ranks(arguments, range(nproc), {**os.environ, **place, **shared}))


def start_ranks(arguments: Sequence[str], ranks: range, environment: Mapping[str, str]) -> list[Started]:
    """Start ranks on this machine.

    Args:
        arguments: of the ``upcycle`` command, the same for all.
        ranks: their numbers among all ranks of the run.
        environment: theirs, with WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    """
    shared = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(ranks))), **environment}
    return [
        Local([*run_module(_MODULE), *arguments], {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank - ranks.start)})
        for rank in ranks
    ]


def wait(started: Sequence[Started]) -> int:
    """Wait for all processes; returns 0, the exit code of the first that failed, or 130 if a signal ended them.

    Signals that stop a run are passed on, and a second one kills all processes. When one fails, the others are ended, too.
    """
    try:
        with _handing_on(started):
            return _wait(started)
    except _AtOnce:
        return INTERRUPTED
    finally:
        for each in started:
            if each.code() is None:
                each.kill()


class _AtOnce(Exception):  # noqa: N818 - nothing went wrong
    """A second signal came: end at once."""


@contextmanager
def _handing_on(started: Sequence[Started]) -> Iterator[None]:
    first: list[float] = []

    def hand_on(number: int, _: FrameType | None) -> None:
        if first and time.monotonic() - first[0] >= TOGETHER:
            raise _AtOnce
        if not first:
            first.append(time.monotonic())
            for each in started:
                each.send(number)

    before = take(hand_on)
    try:
        yield
    finally:
        give_back(before)


def _wait(started: Sequence[Started]) -> int:
    failed, since = 0, 0.0
    while [each for each in started if each.code() is None]:  # a list, so that every process is polled
        codes = [code for code in (each.code() for each in started) if code]
        if codes and not failed:
            failed, since = codes[0], time.monotonic()
        if failed and time.monotonic() - since > (_GRACE if failed == INTERRUPTED else _AFTER_FAILURE):
            for each in started:
                each.send(signal.SIGTERM)
            time.sleep(_LAST_WORDS)
            break
        time.sleep(0.05)
    return failed or next((code for code in (each.code() for each in started) if code), 0)


def command_to_repeat(arguments: Sequence[str]) -> str:
    """The command line that continues the run: without ``--restart``, which would discard the checkpoints."""
    return shlex.join(["upcycle", *(argument for argument in arguments if argument != "--restart")])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
