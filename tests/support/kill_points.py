"""A process that dies at its Nth change of the disk, without dying: tests import it as ``kill_points``.

Python tells an audit hook of every file that is opened to be written, renamed or removed and every folder that is made or removed.
From the chosen change on each of them fails, so that no ``finally`` tidies up what a killed process would have left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


class Killed(BaseException):
    """What a kill looks like from inside."""


class _Points:
    """``changes`` under ``root`` are counted; those from number ``at`` on do not happen (0: all do)."""

    def __init__(self) -> None:
        self.root, self.at, self.error = "", 0, None
        self.changes: list[str] = []
        self.opened: list[
            tuple[Path, int] | None
        ] = []  # of each change that opens a file: which, and what it held before
        self._installed = False

    def install(self) -> None:
        if not self._installed:
            sys.addaudithook(self._hook)
            self._installed = True

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.root or not (event in _CHANGES or (event == "open" and arguments[2] & _WRITES)):
            return
        path = arguments[0]
        if isinstance(path, int) or path is None:
            return
        name = os.fsdecode(path)
        relative = event in ("os.remove", "os.rmdir") and not name.startswith("/")  # within a tree that is removed
        if not (relative or name.startswith(self.root)):
            return
        self.changes.append(f"{event} {name.removeprefix(self.root)}")
        self.opened.append(self._before(name, arguments[2]) if event == "open" else None)
        if self.at and len(self.changes) >= self.at:
            raise self.error or Killed(self.changes[-1])

    def _before(self, name: str, flags: int) -> tuple[Path, int]:
        path = Path(name)
        kept = path.is_file() and not flags & os.O_TRUNC
        return path, path.stat().st_size if kept else 0


POINTS = _Points()


@contextmanager
def killed_at(root: Path, at: int, error: BaseException | None = None) -> Iterator[list[str]]:
    """Count the changes below ``root``, or fail the ``at``-th and all after it; gives the list of them, as it grows."""
    POINTS.install()
    POINTS.changes, POINTS.opened, POINTS.at, POINTS.error = [], [], at, error
    POINTS.root = str(root)
    try:
        yield POINTS.changes
    finally:
        POINTS.root = ""


def cut_what_was_being_written(at: int) -> bool:
    """Cut the file that the last change before the ``at``-th opened to half of what was written into it since.

    That is how a kill between the two can leave it: Python writes what it holds back when it unwinds, a killed process does not.

    Returns:
        Whether something was cut.
    """
    last = POINTS.opened[at - 2] if at > 1 else None
    if last is None:
        return False
    path, before = last
    if path.is_symlink() or not path.is_file() or path.stat().st_size <= before:
        return False
    os.truncate(path, before + (path.stat().st_size - before) // 2)
    return True
