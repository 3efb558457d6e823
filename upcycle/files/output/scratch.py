"""Makes temporary folders for data too large for memory, and removes them, even after a kill: the next command does it."""

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
    """Create a folder in ``TMPDIR`` for the ``with`` block, locked so that other commands know that it is in use.

    Raises:
        EnvironmentFault: the disk became full while the block wrote to the folder.
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
    """Remove folders that killed commands of this user left: those with a lock that no process holds."""
    for folder in root.glob(f"{_PREFIX}*"):
        try:
            ours = not hasattr(os, "getuid") or folder.lstat().st_uid == os.getuid()
            if not ours or folder.is_symlink() or not (folder / LOCK).is_file():
                continue  # a folder without a lock was created a moment ago
            lock = FolderLock(folder, "in use")
            lock.acquire()
        except (OSError, UpcycleError):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
