"""Where a conversion happens until it is finished: ``OUT.partial`` beside OUT, locked, resumable, renamed at the end.

OUT itself appears complete or not at all; what was there before is moved away only once its successor is complete.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType

from upcycle.errors import CheckpointError, EnvironmentFault, UpcycleError, UsageError
from upcycle.parsing import read_json

LAYER_BLUEPRINTS = "layer_blueprints"  # one file per decided layer, until all are joined
CALIBRATION_FOLDER = "calibration"  # the calibration tokens' states
MEASURED = "measured.jsonl"  # what merges were decided by
_STATE = "state.json"
_JOURNAL = "journal.jsonl"
_LOCK = ".lock"
UNFINISHED = (_STATE, _JOURNAL, MEASURED)  # what only a folder holds that is being worked on


class Workspace:
    """The working folder of one OUT.

    Args:
        out: where the result goes.
        fingerprint: identifies the job; an unfinished conversion of the same job is continued.
        overwrite: replace a non-empty OUT once the new one is complete.
        restart: throw an unfinished conversion of another job away.

    Raises:
        UsageError: OUT is not empty, or holds another unfinished job.
        EnvironmentFault: OUT cannot be written.
        UpcycleError: another process is writing OUT.
    """

    def __init__(self, out: Path, fingerprint: str, overwrite: bool = False, restart: bool = False) -> None:
        self.out = out
        self.folder = sibling(out, ".partial")
        self._fingerprint = fingerprint
        self._overwrite = overwrite
        self._restart = restart
        self.resumed = False

    def __enter__(self) -> Workspace:
        check_output(self.out, self._overwrite)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UpcycleError(
                f"another process is writing {self.out}", hint="wait for it to finish, or choose another folder"
            ) from None
        try:
            self._claim()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def _claim(self) -> None:
        state = self.folder / _STATE
        try:
            found = read_json(state)["fingerprint"] if state.exists() else None
        except (CheckpointError, KeyError):
            found = "unreadable"
        if found == self._fingerprint:
            self.resumed = True
            return
        if found is not None and not self._restart:
            raise UsageError(
                f"{self.folder} holds an unfinished conversion of another recipe, source or version",
                hint="--restart throws it away and begins anew",
            )
        for path in self.folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        state.write_text(json.dumps({"fingerprint": self._fingerprint}) + "\n", encoding="utf-8")

    def publish(self, failed: bool = False) -> Path:
        """Rename the finished folder to OUT, or to ``OUT.failed`` when verification found it broken."""
        destination = sibling(self.out, ".failed") if failed else self.out
        for name in UNFINISHED:
            (self.folder / name).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            sync(path)
        previous = sibling(destination, ".previous")
        replaced = destination.exists()
        if replaced:
            shutil.rmtree(previous, ignore_errors=True)
            destination.rename(previous)
        self.folder.rename(destination)
        (destination / _LOCK).unlink(missing_ok=True)
        sync(destination)
        sync(destination.parent)
        if replaced:
            shutil.rmtree(previous)
        return destination

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        begun = (self.folder / name for name in (LAYER_BLUEPRINTS, _JOURNAL, MEASURED))
        if isinstance(error, UpcycleError) and not any(map(_holds_something, begun)):
            # Nothing to continue: a corrected command needs no --restart.
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0


def sibling(path: Path, suffix: str) -> Path:
    """``path`` with ``suffix`` added to its name."""
    return path.with_name(path.name + suffix)


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an OUT that would be lost.

    Raises:
        UsageError: OUT is a file, or a non-empty folder without ``overwrite``.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, and the output is a folder", hint="choose another name")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"{out} is not empty", hint="--overwrite replaces it once the new model is complete")


def cannot_write(path: Path, error: OSError) -> EnvironmentFault:
    """The error for a folder that cannot be written."""
    return EnvironmentFault(f"cannot write {path}: {error.strerror}", hint="choose a folder you may write to")


def sync(path: Path) -> None:
    """Make sure a file's or folder's content survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
