"""Starts ranks on this machine, hands signals on to them, and waits; with :mod:`upcycle.trainers.distributed.hosts` on several."""

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

COMMAND = "UPCYCLE_COMMAND"  # in a rank's environment: the command that started all of them
_MODULE = "upcycle.cli.main"
_GRACE = 600.0  # seconds that the others have to save, once one has stopped
_AFTER_FAILURE = 15.0  # seconds that the others have to say why, once one has failed
_LAST_WORDS = 1.0  # seconds between asking the others to end and ending them


class Started(Protocol):
    """A process that was started: a rank, or the ranks of another machine."""

    def code(self) -> int | None:
        """Its exit code as a shell gives it, or ``None`` while it runs."""

    def send(self, number: int) -> None:
        """Have it told of a signal."""

    def kill(self) -> None:
        """End it and all it started, and wait for that."""


class Local:
    """A process here, in a session of its own: a terminal's Ctrl-C reaches it once, by :meth:`send`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], control: bool = False) -> None:
        """``control``: its standard input is a pipe, for :attr:`process`."""
        self.process = subprocess.Popen(
            command,
            env=safe_environment(environment) | {LAUNCHER: str(os.getpid())},
            stdin=subprocess.PIPE if control else subprocess.DEVNULL,
            start_new_session=True,
        )

    def code(self) -> int | None:
        """See :class:`Started`."""
        found = self.process.poll()
        return 128 - found if found is not None and found < 0 else found

    def send(self, number: int) -> None:
        """See :class:`Started`."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """See :class:`Started`."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def launch(arguments: Sequence[str], nproc: int) -> int:
    """Run ``upcycle ARGUMENTS`` as ``nproc`` ranks here; returns their exit code, see :func:`wait`."""
    place = {"WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return wait(start_ranks(arguments, range(nproc), {**os.environ, **place}))


def start_ranks(arguments: Sequence[str], ranks: range, environment: Mapping[str, str]) -> list[Started]:
    """Start ranks here; ``environment`` says how many there are in all, and where they meet."""
    shared = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(ranks))), **environment}
    return [
        Local([*run_module(_MODULE), *arguments], {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank - ranks.start)})
        for rank in ranks
    ]


def wait(started: Sequence[Started]) -> int:
    """Wait for all; returns 0, or the exit code of the first that failed, 130 where a signal ended them.

    Signals that stop a run are handed on, and a second one kills all. When one fails, the others are ended.
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
    """A second signal came."""


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
    while [each for each in started if each.code() is None]:  # all are asked, not only up to the first that runs
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
    """The ``upcycle`` command of these arguments as one gives it again: whatever threw checkpoints away is left out."""
    return shlex.join(["upcycle", *(argument for argument in arguments if argument != "--restart")])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
