"""Manages the working folder, ``OUT.partial`` beside OUT: locked, able to continue, and put in OUT's place once finished.

Every verb that writes a whole folder uses it. OUT appears complete or not at all; an earlier OUT is moved away only once the new
one is complete, and only if upcycle wrote it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.files.atomic_files import TEMPORARY, sync
from upcycle.files.names import JOURNAL, LOCKS, MEASURED, STATE, UNFINISHED, WRITTEN, free_sibling, sibling
from upcycle.files.output.locks import FolderLock
from upcycle.files.output.ownership import (
    MADE_BY,
    cannot_write,
    check_output,
    folder_identity,
    folder_kind,
    is_scrap,
    read_state,
    real_path,
    working_folder,
)
from upcycle.files.output.placing import moved_from, place, put_back, save_state

LAYER_BLUEPRINTS = "layer_blueprints"  # folder with a file per decided layer, until all are joined
CALIBRATION_FOLDER = "calibration"  # folder with the hidden states of the calibration tokens
_TEMPORARY = (TEMPORARY, ".tmp")


def _silent(_: str) -> None:
    pass


class Workspace:
    """The working folder of one OUT.

    Args:
        out: the output folder.
        fingerprint: identifies the job; unfinished work on the same job is continued.
        overwrite: replace a non-empty OUT, if upcycle wrote it, once the new one is complete.
        restart: discard unfinished work on another job.
        kind: the kind of work, for messages.
        disposable: discard unfinished work of this kind on another job, even without ``restart``, as it is quickly redone.
        settings: how the result is checked; a result that was finished under other settings is checked again.
        note: called with each message for the user.

    Raises:
        UsageError: OUT is not empty, holds another unfinished job, or its working folder is somebody else's.
        EnvironmentFault: OUT cannot be written.
        UpcycleError: another process is writing OUT.
    """

    def __init__(
        self,
        out: Path,
        fingerprint: str,
        overwrite: bool = False,
        restart: bool = False,
        *,
        kind: str = "conversion",
        disposable: bool = False,
        settings: Any = None,
        note: Callable[[str], None] = _silent,
    ) -> None:
        self.out = real_path(out)
        self._fingerprint, self._kind, self._settings = fingerprint, kind, settings
        self._overwrite, self._restart, self._disposable, self._note = overwrite, restart, disposable, note
        self.resumed = False
        self.folder = self.out
        self._state: dict[str, Any] = {}

    @property
    def finished(self) -> bool:
        """Whether an earlier run finished everything but :meth:`publish`."""
        return "finished" in self._state and self._state.get("settings") == self._settings

    def __enter__(self) -> Workspace:
        check_output(self.out, self._overwrite)
        self.folder = self._found()
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise UsageError(
                f"{self.folder} is needed as working folder, and is a link or a file",
                hint="move it away, or choose another name for the output",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.folder, f"another process is writing {self.out}", self._note)
            self._lock.acquire()
        except OSError as error:
            raise _full(self.out, error) or cannot_write(self.folder, error) from None
        try:
            self._claim()
            check_output(self.out, self._overwrite)
            self._allowed = folder_identity(self.out)
        except OSError as error:
            self._lock.release()
            raise _full(self.out, error) or cannot_write(self.folder, error) from None
        except BaseException:
            self._lock.release()
            raise
        return self

    def _places(self) -> tuple[Path, Path]:
        return self.out, sibling(self.out, ".failed")

    def _found(self) -> Path:
        """Return the folder to work in. Another job's result that a killed command began to put in place is completed first."""
        for place_ in self._places():
            state = read_state(place_)
            if state is None or "finished" not in state:
                continue
            if (state["fingerprint"], state.get("settings")) != (self._fingerprint, self._settings):
                settle(place_, self._note)
            elif state.get("moving"):
                return moved_from(place_, state) or place_
            else:
                return place_
        return working_folder(self.out)

    def _claim(self) -> None:
        found = read_state(self.folder)
        if found is None:
            self._begin(self._nothing_else())
            return
        if found["fingerprint"] == self._fingerprint:
            self.resumed, self._state = True, found
            if found.get("settings") != self._settings:  # its verification is out of date
                put_back(self.folder, self.out, found)
                (self.folder / "verification.json").unlink(missing_ok=True)
                found.pop("finished", None)
                self._remember(settings=self._settings)
            return
        put_back(self.folder, self.out, found)
        if not self._restart and not (self._disposable and found.get("kind") == self._kind):
            raise UsageError(
                f"{self.folder} holds an unfinished {found.get('kind')} of another recipe, source or version",
                hint=f"move {self.folder} away, or choose another folder"
                if self._disposable
                else "--restart discards it and begins again",
            )
        self._begin([path for path in self.folder.iterdir() if not is_scrap(path.name)])

    def _nothing_else(self) -> list[Path]:
        """Return what a folder holds that was created as a working folder but has no state yet.

        Raises:
            UsageError: the folder holds something that upcycle did not write.
        """
        present = [path for path in self.folder.iterdir() if path.name not in LOCKS]
        other = [path.name for path in present if not is_scrap(path.name) and path.name != STATE]
        state = self.folder / STATE  # after a power cut, some file systems leave it empty
        if other or (os.path.lexists(state) and (state.is_symlink() or state.stat().st_size)):
            raise UsageError(
                f"{self.folder} is needed as working folder, and upcycle did not write what is in it "
                f"({', '.join(sorted(other)[:3]) or STATE})",
                hint="move it away, or choose another name for the output",
            )
        return present

    def _begin(self, left: list[Path]) -> None:
        # state.json proves that the rest is upcycle's, so it is removed last.
        for path in sorted(left, key=lambda path: path.name == STATE):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._state = {**MADE_BY, "kind": self._kind, "fingerprint": self._fingerprint, "settings": self._settings}
        save_state(self.folder, self._state)

    def _remember(self, **facts: Any) -> None:
        self._state |= facts
        save_state(self.folder, self._state)

    def publish(self, failed: bool = False) -> Path:
        """Make the finished folder into OUT, or ``OUT.failed`` where verification found it broken.

        Nothing is lost where a call fails or is stopped: the same job is then :attr:`finished`, and only needs this call.

        Raises:
            UsageError: somebody else has filled OUT meanwhile.
            EnvironmentFault: the disk is full, or the folder cannot be put in place.
        """
        if not self.finished:
            sweep(self.folder)
            for path in self.folder.iterdir():
                sync(path)
            sync(self.folder)
            self._remember(finished="failed" if failed else "out")
        if self.folder in self._places():
            destination = self.folder
        else:
            destination = self.out if self._state["finished"] == "out" else self._failed()
        allowed = self._allowed if destination == self.out else folder_identity(destination)
        place(self.folder, destination, self._state, allowed, self._note, set(UNFINISHED))
        self.folder = destination
        return destination

    def _failed(self) -> Path:
        found = sibling(self.out, ".failed")
        ours = not found.is_symlink() and folder_kind(found) in ("empty", "result")
        return found if ours or not os.path.lexists(found) else free_sibling(self.out, ".failed")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        begun = (self.folder / name for name in (LAYER_BLUEPRINTS, JOURNAL, MEASURED, WRITTEN))
        nothing = "finished" not in self._state and not any(map(_holds_something, begun))
        if isinstance(error, UpcycleError) and nothing and self.folder != self.out:
            # There is nothing to continue, and a corrected command should not need --restart.
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def settle(out: Path, note: Callable[[str], None] = _silent) -> None:
    """Put a finished result in the place of ``out``, where a command was killed while it did so.

    Raises:
        UpcycleError: another process is writing ``out``.
    """
    out = real_path(out)
    state = read_state(out)
    if state is None or "finished" not in state:
        return
    lock = FolderLock(out, f"another process is writing {out}", note)
    lock.acquire()
    try:
        source = moved_from(out, state) if state.get("moving") else None
        place(source or out, out, state, None, note, set(UNFINISHED))
    finally:
        lock.release()


def remove_parts(folder: Path) -> None:
    """Remove the parts that a conversion kept of every layer until all were written."""
    for name in (LAYER_BLUEPRINTS, CALIBRATION_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a working folder whose files are all complete."""
    for path in folder.iterdir():
        if path.name.endswith(_TEMPORARY) and path.is_file():
            path.unlink()


@contextmanager
def explained_system_errors(out: Path) -> Iterator[None]:
    """Turn a system's error in the ``with`` block into one that tells the user what to do.

    Raises:
        EnvironmentFault: the disk is full or fails, or a file is too large for it.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if fault := _full(out, error):
            raise fault from error
        raise


def _number(error: Exception) -> int | None:
    """Return the system's number of an error; safetensors says it in words alone."""
    if isinstance(error, OSError):
        return error.errno
    said = re.search(r"os error (\d+)", str(error))
    return int(said[1]) if said else None


def _full(out: Path, error: Exception) -> EnvironmentFault | None:
    number = _number(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentFault(
            f"the disk is full while writing {out}", hint="free some space, then run the same command again to continue"
        )
    if number == errno.EFBIG:
        return EnvironmentFault(
            f"a file of {out} is larger than its disk or the limit of this shell allows",
            hint="--max-shard-size 2GB, or another disk",
        )
    if number is not None and number in (
        errno.EIO,
        errno.EROFS,
        errno.ESTALE,
        errno.ENOSYS,
        errno.EINVAL,
        errno.EBUSY,
        errno.ENXIO,
    ):
        return EnvironmentFault(
            f"the disk fails while writing {out}: {os.strerror(number)}",
            hint="check the disk, then run the same command again to continue",
        )
    return None


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0
