"""Writes files as a whole: a reader finds the old file or the new one, never a part, and no link is followed to another file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upcycle.files.names import sibling

TEMPORARY = ".partial"
# What fsync answers on file systems that cannot promise it: some network ones, and on Windows most folders.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EISDIR)


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, and rename it to ``path`` once it is complete and on the disk.

    Several processes may write the same file. A link called ``path`` is replaced, not followed.
    """
    partial = sibling(path, f".{os.getpid()}.{os.urandom(4).hex()}{TEMPORARY}")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # fails where somebody has laid a link
    try:
        write(partial)
        sync(partial)
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> Path:
    """Write UTF-8 text as a whole; line ends stay as they are."""
    return write_whole(path, lambda partial: partial.write_bytes(text.encode()))


def sync(path: Path) -> None:
    """Make sure a file's or folder's content survives a power cut, as far as its file system can promise that.

    Raises:
        OSError: it cannot be read, or did not get onto the disk.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if path.is_dir() and error.errno in _NO_SYNC:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
