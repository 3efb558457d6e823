"""Links in folders that others made: what one points at is read only where it belongs to the folder.

An archive or a clone may hold ``NOTICE`` as a link to ``~/.cache/huggingface/token``; copied, its content would be published.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from upcycle.errors import CheckpointError


def inside(path: Path, folder: Path) -> Path:
    """``path`` with its links followed, where that is still in ``folder``.

    The hub's cache is such a folder and the blobs beside it: every file of ``models--X/snapshots/REVISION`` is a link into
    ``models--X/blobs``.

    Raises:
        CheckpointError: it leaves the folder.
    """
    real, root = path.resolve(), folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(each) for each in roots):
        raise CheckpointError(
            f"{path} is a link that leaves its folder (to {real})",
            hint="if you trust it, put the file itself in its place (cp --remove-destination); else delete the link",
        )
    return real


def copy_inside(path: Path, folder: Path, destination: Path) -> None:
    """Copy what ``path``, in ``folder``, holds.

    Raises:
        CheckpointError: it is a link that leaves the folder.
    """
    shutil.copyfile(inside(path, folder), destination)
