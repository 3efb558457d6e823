"""Puts a finished folder in the place of an output, so that a kill, a full disk or a stranger at any moment loses nothing.

By renaming where the file system lets it; else (mount points, folders of an overlay) file by file. What is replaced is moved away
first, and removed last, and only if upcycle wrote all of it. ``state.json`` says how far it has come, and is removed last of all.
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
    identity,
    is_scrap,
    kind_of,
    read_state,
    strangers,
)

# What systems answer to a rename that copying can do: other disks, mount points, layers of an overlay, odd network systems.
_RENAME_REFUSED = (
    *(errno.EXDEV, errno.EBUSY, errno.EINVAL, errno.EPERM, errno.EACCES),
    *(errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS),
)
_LAST = ("config.json", TRAINED, RECORD)  # until these are there, nothing takes a folder for a model
Identity = tuple[int, int, str]


def place(
    working: Path,
    out: Path,
    state: dict[str, Any],
    allowed: Identity | None,
    note: Callable[[str], None],
    extra: set[str],
) -> None:
    """Make the finished folder ``working`` into ``out``; a call that was stopped is completed by the same call.

    Args:
        working: it holds ``state.json``, which says that it is finished.
        out: its place: missing, empty, what ``allowed`` says, or what an earlier call began.
        state: the content of ``state.json``; it is kept up to date.
        allowed: what may be replaced.
        note: is told what of the replaced folder is kept, and where.
        extra: names in ``working`` that only unfinished folders hold.

    Raises:
        UsageError: somebody has filled ``out`` meanwhile.
        EnvironmentFault: it cannot be moved there.
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
    """Write ``state.json``, the old one or the new one."""
    write_whole(folder / STATE, lambda partial: partial.write_text(json.dumps(state) + "\n", encoding="utf-8"))


def put_back(working: Path, out: Path, state: dict[str, Any]) -> None:
    """Where a kill struck between moving the old folder away and putting the new one there: give the old one its name back."""
    old = _replaced(out, state)
    if old is None or old.parent != out.parent or not old.is_dir() or os.path.lexists(out):
        return
    old.rename(out)
    state.pop("replaced")
    save_state(working, state)


def _replaced(out: Path, state: dict[str, Any]) -> Path | None:
    """Where the folder was moved that is replaced. Only the name was kept: folders may have moved as a whole."""
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
    if old is None or not old.is_dir():  # else an earlier call was stopped while it moved what is replaced
        if allowed is None or identity(out) != allowed:
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
    """Whether an earlier call copied it, which is then completed by removing it. A folder is copied over the begun copy."""
    if not os.path.lexists(copy) or (path.is_dir() and copy.is_dir()):
        return False
    plain = path.is_file() and copy.is_file() and not path.is_symlink() and not copy.is_symlink()
    if plain and hash_file(path) == hash_file(copy):
        path.unlink()
    return True  # of another content: somebody else's, which stays


def _filled(working: Path, out: Path) -> UsageError:
    return UsageError(
        f"{out} was filled by somebody else meanwhile, and is left as it is; the finished model waits in {working}",
        hint=f"move {out} away and give the same command again: nothing is done twice",
    )


def _renamed(old: Path, new: Path) -> bool:
    """Rename a folder, to one that is missing or empty; False where the file system will not.

    Raises:
        UsageError: the new one is neither.
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
    """File by file. ``state.json`` in both folders says that ``out`` is unfinished until all are there."""
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
    """The order in which files are moved: what makes a folder a model, and ours, comes and goes last."""
    return (_LAST.index(name) + 1 if name in _LAST else 0, name)


def moved_from(out: Path, state: dict[str, Any]) -> Path | None:
    """The folder whose files are, or were, being moved to ``out``."""
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
    """What is left to remove once ``out`` stands."""
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
            if found := strangers(old):
                some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
                note(f"what was in {out} is kept in {old}: upcycle did not write all of it ({some})")
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
    """An error of the system while the finished folder is put in place says where it is."""
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        where = working if kind_of(working) == "working" else out
        raise EnvironmentFault(
            f"{out} could not be put in place: {what}; the finished model is in {where}",
            hint="see to that, then give the same command again: nothing is done twice",
        ) from None
