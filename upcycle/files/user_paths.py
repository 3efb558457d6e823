"""Paths as users write them, and where this user's caches are: on machines without a home folder or a user's name, too."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def user_path(name: str | os.PathLike[str]) -> Path:
    """A path with ``~`` at its beginning replaced, where it is known whose home that is; else it is a name like others."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises a RuntimeError there


def cache_folder() -> Path | None:
    """A folder for what can be made again, that only this user can write to: ``$XDG_CACHE_HOME/upcycle`` or ``~/.cache/upcycle``.

    Where neither can be used, as of a container's user without a home, it is in the system's folder for temporary files. None:
    not there either.
    """
    root = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    places = [root / "upcycle"] if root.is_absolute() else []
    with suppress(OSError, AttributeError):  # no folder of the system's can be written; users have no numbers
        places.append(Path(tempfile.gettempdir()) / f"upcycle-{os.getuid()}")
    return next((place for place in places if _usable(place)), None)


def only_ours(path: Path) -> bool:
    """Whether nobody else can write to it, as far as its mode tells: on Windows it does not, and the answer is no."""
    found = path.stat()
    return hasattr(os, "getuid") and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _usable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return only_ours(folder) and os.access(folder, os.W_OK)
    except OSError:
        return False
