"""Follows links in folders that others made only as far as they stay inside the folder.

An archive or a clone may hold ``NOTICE`` as a link to ``~/.cache/huggingface/token``; copying it would publish the token.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from upcycle.errors import CheckpointError


def inside(path: Path, folder: Path) -> Path:
    """Return ``path`` with its links followed, if the result still lies in ``folder``.

    In the hub's cache, every file of ``models--X/snapshots/REVISION`` is a link into ``models--X/blobs``, so those blobs count as
    part of the folder.

    Raises:
        CheckpointError: a link leaves the folder.
    """
    real, root = path.resolve(), folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(each) for each in roots):
        raise CheckpointError(
            f"{path} is a link that leaves its folder (to {real})",
            hint="if you trust it, replace the link by the file itself (cp --remove-destination); otherwise delete the link",
        )
    return real


def copy_inside(path: Path, folder: Path, destination: Path) -> None:
    """Copy the content of ``path``, a file in ``folder``, to ``destination``.

    Raises:
        CheckpointError: ``path`` is a link that leaves the folder.
    """
    shutil.copyfile(inside(path, folder), destination)
