"""Temporary folders for what is too large for memory: gone with the command, and where it was killed, with the next one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upcycle.errors import EnvironmentFault, UpcycleError
from upcycle.files.names import LOCK
from upcycle.files.output.locks import FolderLock

_PREFIX = "upcycle-scratch-"


@contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """A folder of this command's own in ``TMPDIR``; it is locked, so that others know that it is in use.

    Raises:
        EnvironmentFault: there is no room for what is written there.
    """
    root = Path(tempfile.gettempdir())
    _sweep(root)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-"))
    lock = FolderLock(folder, f"{folder} is in use")
    try:
        lock.acquire()
        yield folder
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise EnvironmentFault(
            f"the disk is full while writing {folder}", hint="free some space, or name another folder with TMPDIR"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _sweep(root: Path) -> None:
    """Remove what killed commands of this user left: folders with a lock that nobody has."""
    for folder in root.glob(f"{_PREFIX}*"):
        try:
            ours = not hasattr(os, "getuid") or folder.lstat().st_uid == os.getuid()
            if not ours or folder.is_symlink() or not (folder / LOCK).is_file():
                continue  # without a lock it was made just now
            lock = FolderLock(folder, "in use")
            lock.acquire()
        except (OSError, UpcycleError):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
