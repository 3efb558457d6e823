"""Lets only one process at a time work in a folder, also on file systems that have no locks."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from upcycle.errors import CheckpointError, UpcycleError
from upcycle.files.formats.parsing import read_json
from upcycle.files.names import LOCK, PID_LOCK

_BEING_WRITTEN = 10.0  # seconds after which an empty lock file is one whose process died while writing it


def _silent(_: str) -> None:
    pass


class FolderLock:
    """The lock of a folder, taken by :meth:`acquire` and released by :meth:`release` or by the end of the process.

    Where the file system has no locks (some network and user-space ones), a file names the process that holds the lock. It
    counts no longer once that process has ended, if it ran on this machine.

    Args:
        folder: an existing folder.
        busy: the message when another process holds the lock.
        note: called with a note where the file system has no locks.
    """

    def __init__(self, folder: Path, busy: str, note: Callable[[str], None] = _silent) -> None:
        self._folder, self._busy, self._note = folder, busy, note
        self._descriptor = -1
        self._file: Path | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UpcycleError: another process holds it.
            OSError: the folder cannot be written.
        """
        while True:
            descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            try:
                locked = _lock(descriptor)
            except BlockingIOError:
                os.close(descriptor)
                raise UpcycleError(self._busy, hint="wait for it to finish, or choose another folder") from None
            # Its last holder may have renamed the folder meanwhile. This would then be a lock on a file that nobody else opens.
            try:
                same = os.path.samestat(os.fstat(descriptor), (self._folder / LOCK).stat())
            except OSError:
                same = False
            if not same:
                os.close(descriptor)
                if not self._folder.is_dir():
                    raise UpcycleError(self._busy, hint="it has just finished: see what it wrote")
                continue
            self._descriptor = descriptor
            if not locked:
                try:
                    self._by_process()
                except BaseException:
                    self.release()
                    raise
            return

    def release(self) -> None:
        """Release the lock. The lock file stays; the file that names this process is removed."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _by_process(self) -> None:
        path = self._folder / PID_LOCK
        for _ in range(8):  # each time, a file that a dead process left is removed
            try:
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                self._refuse_or_remove(path)
                continue
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(_this_process(), file)
            self._file = path
            self._note(f"the file system of {self._folder} has no locks: keep other commands away from it meanwhile")
            return
        raise UpcycleError(self._busy, hint=f"if no other process is running, remove {path}")

    def _refuse_or_remove(self, path: Path) -> None:
        try:
            holder = read_json(path)
            gone = holder["host"] == socket.gethostname() and not _runs(holder)
            who = f"process {int(holder['pid'])} on {holder['host']}"
        except (CheckpointError, OSError, ValueError, KeyError, TypeError):
            if not path.exists():
                return
            gone, who = _age(path) > _BEING_WRITTEN, "it"
        if not gone:
            raise UpcycleError(self._busy, hint=f"if {who} is no longer running, remove {path}")
        path.unlink(missing_ok=True)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Run the ``with`` block while no other process runs one with the same lock file ``path``, which is created.

    Use it only to avoid doing work twice: on file systems without locks, nobody waits.

    Raises:
        OSError: the file cannot be created.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file; False where the system or the file system has no locks.

    The lock is the system's (``flock``, on Windows ``LockFileEx``): it ends with the descriptor, however the process does.

    Raises:
        BlockingIOError: another process holds the lock, and ``wait`` is False.
    """
    try:
        taken = lock_descriptor(descriptor, blocking=wait)
    except OSError:
        return False
    if not taken:
        raise BlockingIOError
    return True


def _this_process() -> dict[str, Any]:
    import psutil

    return {"pid": os.getpid(), "started": psutil.Process().create_time(), "host": socket.gethostname()}


def _runs(holder: dict[str, Any]) -> bool:
    """Return whether the process that wrote ``holder`` is alive, and not just another one with the same number."""
    import psutil

    try:
        return abs(psutil.Process(int(holder["pid"])).create_time() - float(holder["started"])) < 1
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
