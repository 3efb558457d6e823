"""Puts a finished folder in the place of an output, so that nothing is lost by a kill, a full disk or another program at any moment.

The folder is renamed where the file system allows it, and otherwise (mount points, folders of an overlay) moved file by file. What
it replaces is moved away first, and removed at the end if upcycle wrote all of it. ``state.json`` says how far this has come, and is
removed last of all.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.files.atomic_files import TEMPORARY, sync, write_whole
from upcycle.files.hashing import hash_file
from upcycle.files.names import LOCK, RECORD, STATE, TRAINED, free_sibling, sibling
from upcycle.files.output.ownership import (
    REPLACED_INSIDE,
    contents,
    folder_identity,
    folder_kind,
    foreign_files,
    is_scrap,
    read_state,
)

# Errors of a rename where copying still works: other disks, mount points, layers of an overlay, some network file systems.
_RENAME_REFUSED = (
    *(errno.EXDEV, errno.EBUSY, errno.EINVAL, errno.EPERM, errno.EACCES),
    *(errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS),
)
_LAST = ("config.json", TRAINED, RECORD)  # without these, no program takes a folder for a model
Identity = tuple[int, int, str]


def place(
    working: Path,
    out: Path,
    state: dict[str, Any],
    allowed: Identity | None,
    note: Callable[[str], None],
    extra: set[str],
) -> None:
    """Make the finished folder ``working`` into ``out``. A call that was stopped is completed by repeating it.

    Args:
        working: the finished folder; its ``state.json`` says that it is finished.
        out: its destination: a missing or empty folder, the one that ``allowed`` identifies, or one that an earlier call began.
        state: the content of ``state.json``; it is updated in memory and on the disk.
        allowed: the identity of the folder that may be replaced; None: none may.
        note: called with a message where a replaced folder is kept.
        extra: names in ``working`` that only unfinished folders hold.

    Raises:
        UsageError: somebody else has filled ``out`` meanwhile.
        EnvironmentFault: the folder cannot be moved there.
    """
    if working != out:
        with _explained(working, out):
            begun = read_state(out)
            if begun is None or begun.get("fingerprint") != state["fingerprint"]:
                _make_way(working, out, state, allowed)
                moving = not _renamed(working, out)
            else:
                moving = True  # an earlier call was stopped while it moved files
            if moving:
                _move_in(working, out, state)
            sync(out)
            sync(out.parent)
    _clean(out, state, note, extra)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state.json`` as a whole."""
    write_whole(folder / STATE, lambda partial: partial.write_text(json.dumps(state) + "\n", encoding="utf-8"))


def put_back(working: Path, out: Path, state: dict[str, Any]) -> None:
    """Rename a replaced folder back to ``out``, where a kill has left ``out`` missing before the new folder was put there."""
    old = _replaced(out, state)
    if old is None or old.parent != out.parent or not old.is_dir() or os.path.lexists(out):
        return
    old.rename(out)
    state.pop("replaced")
    save_state(working, state)


def _replaced(out: Path, state: dict[str, Any]) -> Path | None:
    """Return where the replaced folder was moved. The state has only its name, so that the folder around may be moved."""
    found = state.get("replaced")
    if not isinstance(found, str) or Path(found).name != found:
        return None
    return (out if state.get("inside") else out.parent) / found


def _make_way(working: Path, out: Path, state: dict[str, Any], allowed: Identity | None) -> None:
    present = contents(out) if out.is_dir() else []
    if not os.path.lexists(out) or (out.is_dir() and not present):
        return
    inside = working.parent == out
    old = _replaced(out, state)
    if old is None or not old.is_dir():  # otherwise an earlier call was stopped while it moved the replaced files
        if allowed is None or folder_identity(out) != allowed:
            raise _filled(working, out)
        old = free_sibling(out / REPLACED_INSIDE, "") if inside else free_sibling(out, ".replaced")
        state |= {"replaced": old.name, "inside": inside, "old": present}
        save_state(working, state)
        if not inside and _renamed(out, old):
            return
    old.mkdir(exist_ok=True)
    for name in sorted(state["old"], key=_last):
        if os.path.lexists(out / name) and not _moved_before(out / name, old / name):
            _move(out / name, old / name)
    if contents(out):
        raise _filled(working, out)


def _moved_before(path: Path, copy: Path) -> bool:
    """Return whether an earlier call has copied ``path``; the file is then removed, which completes its move.

    A folder is copied again, over the begun copy.
    """
    if not os.path.lexists(copy) or (path.is_dir() and copy.is_dir()):
        return False
    plain = path.is_file() and copy.is_file() and not path.is_symlink() and not copy.is_symlink()
    if plain and hash_file(path) == hash_file(copy):
        path.unlink()
    return True  # a file of other content is somebody else's, and stays


def _filled(working: Path, out: Path) -> UsageError:
    return UsageError(
        f"{out} was filled by somebody else meanwhile, and is left as it is; the finished model waits in {working}",
        hint=f"move {out} away and run the same command again: nothing is done twice",
    )


def _renamed(old: Path, new: Path) -> bool:
    """Rename a folder to a path that is missing or an empty folder; return False where the file system refuses.

    Raises:
        UsageError: ``new`` is neither missing nor empty.
    """
    if new in old.parents:
        return False
    try:
        if new.is_dir():
            for path in new.iterdir():
                if is_scrap(path.name) and path.is_file() and (path.name != LOCK or not path.stat().st_size):
                    path.unlink()
        old.replace(new)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _filled(old, new) from None
        if error.errno in _RENAME_REFUSED:
            return False
        raise
    return True


def _move_in(working: Path, out: Path, state: dict[str, Any]) -> None:
    """Move the finished folder file by file. ``state.json`` in both folders says that ``out`` is unfinished until all are there."""
    state |= {"moving": True, "moved_from": os.path.relpath(working, out.parent)}
    out.mkdir(exist_ok=True)
    save_state(working, state)
    save_state(out, state)
    names = [entry.name for entry in os.scandir(working) if entry.name != STATE and not is_scrap(entry.name)]
    for name in sorted(names, key=_last):
        _move(working / name, out / name)
    sync(out)
    state.pop("moving")
    save_state(out, state)


def _last(name: str) -> tuple[int, str]:
    """Return the sort key by which files are moved: those that make a folder a model, and a result of upcycle, come last."""
    return (_LAST.index(name) + 1 if name in _LAST else 0, name)


def moved_from(out: Path, state: dict[str, Any]) -> Path | None:
    """Return the folder whose files are, or were, being moved to ``out``."""
    found = state.get("moved_from")
    path = out.parent / found if isinstance(found, str) else None
    return path if path is not None and path.parent in (out, out.parent) and path != out else None


def _move(old: Path, new: Path) -> None:
    try:
        old.replace(new)
        return
    except OSError as error:
        if error.errno not in _RENAME_REFUSED:
            raise
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(old)
        return
    copy = sibling(new, TEMPORARY)
    copy.unlink(missing_ok=True)
    shutil.copy2(old, copy, follow_symlinks=False)
    if not copy.is_symlink():
        sync(copy)
    copy.replace(new)
    old.unlink()


def _clean(out: Path, state: dict[str, Any], note: Callable[[str], None], extra: set[str]) -> None:
    """Remove what is no longer needed once ``out`` is complete: the working folder, the replaced folder, and ``state.json``."""
    left = moved_from(out, state)
    if (
        left is not None
        and left.is_dir()
        and {path.name for path in left.iterdir() if not is_scrap(path.name)} <= {STATE}
    ):
        shutil.rmtree(left)
    old = _replaced(out, state)
    if old is not None and old.is_dir():
        if not state.get("drop"):
            if found := foreign_files(old):
                some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
                note(f"the old content of {out} is kept in {old}, as upcycle did not write all of it ({some})")
                old = None
            else:
                save_state(out, state := {**state, "drop": True})
        if old is not None:
            shutil.rmtree(old)
    scrap = {path.name for path in out.iterdir() if is_scrap(path.name)}
    for name in (*sorted((extra | scrap) - {STATE}), STATE):
        (out / name).unlink(missing_ok=True)
    sync(out)


@contextmanager
def _explained(working: Path, out: Path) -> Iterator[None]:
    """Turn a system's error while the finished folder is put in place into one that says where that folder is."""
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        where = working if folder_kind(working) == "working" else out
        raise EnvironmentFault(
            f"{out} could not be put in place: {what}; the finished model is in {where}",
            hint="remove the cause, then run the same command again: nothing is done twice",
        ) from None
