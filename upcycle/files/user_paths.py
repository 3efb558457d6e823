"""Reads paths as users write them, and finds a folder for caches, also on machines without a home folder or a user name."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def user_path(name: str | os.PathLike[str]) -> Path:
    """Return a path with a leading ``~`` replaced by the home folder; where that is unknown, ``~`` stays as it is."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises a RuntimeError there


def cache_folder() -> Path | None:
    """Return the cache folder, which only this user can write to: ``$XDG_CACHE_HOME/upcycle`` or ``~/.cache/upcycle``.

    Where these cannot be used, for example by a container's user without a home, it is in the system's folder for temporary
    files; None where that cannot be used either.
    """
    root = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    places = [root / "upcycle"] if root.is_absolute() else []
    with suppress(OSError, AttributeError):  # no folder of the system's can be written; users have no numbers
        places.append(Path(tempfile.gettempdir()) / f"upcycle-{os.getuid()}")
    return next((place for place in places if _usable(place)), None)


def only_ours(path: Path) -> bool:
    """Return whether ``path`` belongs to this user and nobody else can write to it; on Windows, where modes do not tell, False."""
    found = path.stat()
    return hasattr(os, "getuid") and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _usable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return only_ours(folder) and os.access(folder, os.W_OK)
    except OSError:
        return False
