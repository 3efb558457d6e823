"""Signals that end a run: the first lets the step finish and be saved, a second ends the process at once.

This module imports only the standard library: the command loads it before anything else, so that signals are handled from the
first moment on.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Ctrl-C; what clusters send before they take a node away; a terminal or an ssh connection that closes; Slurm's --signal.
# Windows has the first two alone.
STOPPING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
INTERRUPTED = 130  # the exit code of a command that was stopped, whichever signal it was
# Signals within so many seconds count as one: a terminal, a launcher and a cluster may each pass the same one on.
TOGETHER = 0.5
LAUNCHER = "UPCYCLE_LAUNCHER"  # in a rank's environment: the id of the process whose end ends the rank

_END = 0  # ends the watching thread; no signal has this number


class Stopped(KeyboardInterrupt):
    """A signal came while no step was running, so that nothing is lost by ending at once."""


class StopSignals:
    """A context manager that handles all of :data:`STOPPING`.

    Within :meth:`steps` the first signal is only noted in ``received``, where the loop finds it after its step; elsewhere it
    raises :class:`Stopped`. A rank whose launcher has ended sends itself SIGTERM.

    Args:
        say: called, from another thread, with a line on what will happen.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.received: signal.Signals | None = None
        self._say, self._stepping = say, False
        self._first: float | None = None
        self._before: dict[int, Any] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python handles signals in the main thread alone
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        # Python runs signal handlers only between two operations of the main thread, which may hang in a collective. A thread
        # that reads the wake-up descriptor learns of a signal at once, so that a second one can still end such a rank.
        self._before_descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = take(self._handle)
        self._thread = threading.Thread(target=self._watch, args=(_launcher(),), daemon=True, name="signals")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        give_back(self._before)
        signal.set_wakeup_fd(self._before_descriptor)
        os.write(self._write, bytes([_END]))
        self._thread.join()
        self._thread = None
        os.close(self._read)
        os.close(self._write)

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Within this block, a signal waits for the end of the step."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        if not self._stepping:
            raise Stopped(self.received.name)

    def _watch(self, launcher: int | None) -> None:
        while True:
            ready, _, _ = select.select([self._read], [], [], 1.0 if launcher else None)
            if launcher and os.getppid() != launcher:
                launcher = None
                os.kill(os.getpid(), signal.SIGTERM)
            for number in os.read(self._read, 64) if ready else b"":
                if number == _END:
                    return
                if number in STOPPING:
                    self._note(signal.Signals(number))

    def _note(self, received: signal.Signals) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            if self._stepping:
                self._say(f"{received.name}: finishing and saving the current step; send it again to end at once")
        elif now - self._first >= TOGETHER:
            os._exit(INTERRUPTED)


def take(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install ``handler`` for :data:`STOPPING`; returns the handlers before, for :func:`give_back`.

    A SIGHUP that is ignored stays ignored: that is what ``nohup`` asks for.
    """
    numbers = [each for each in STOPPING if each.name != "SIGHUP" or signal.getsignal(each) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def give_back(before: dict[int, Any]) -> None:
    """Install the handlers again that :func:`take` replaced."""
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def interrupting() -> Iterator[None]:
    """Within this block, each of :data:`STOPPING` raises :class:`Stopped`, as Ctrl-C raises KeyboardInterrupt."""

    def handler(number: int, _: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = take(handler)
    try:
        yield
    finally:
        give_back(before)


def _launcher() -> int | None:
    """The id of the process whose end ends this rank: the one with ``--nproc`` or ``--hostfile``, or torchrun's; or ``None``."""
    if LAUNCHER in os.environ:
        return int(os.environ[LAUNCHER])
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
