"""Tells whether a folder is a result of upcycle, a training run, a working folder, or somebody else's, which is never touched.

Names prove nothing. A result has ``upcycle.json`` (or ``training.json``, where a run of a model from elsewhere was exported), a run
has ``run.json``, a working folder has ``state.json``, each with content that only upcycle writes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.files.atomic_files import TEMPORARY
from upcycle.files.formats.parsing import parse_json, read_json
from upcycle.files.hashing import hash_file
from upcycle.files.local_names import LOCAL_NAMES_FILE as LOCAL_FILE
from upcycle.files.names import LOCKS, RECORD, STATE, TRAINED, check_name, sibling
from upcycle.files.user_paths import user_path

RUN = "run.json"
CHECKPOINTS = "checkpoints"
INSIDE = "upcycle.partial"  # the working folder inside an output that cannot be renamed, such as a mount point
REPLACED_INSIDE = "upcycle.replaced"
MADE_BY = {"made_by": "upcycle"}
# Files that a record does not list and that may be removed with a result: upcycle or the system wrote them.
_UNLISTED = {
    *(RECORD, "verification.json", "evaluation.json", "report.html", "report.json", STATE, ".DS_Store"),
    *LOCKS,
    LOCAL_FILE,
}
_CARD = "README.md"
FolderKind = Literal["empty", "result", "run", "working", "foreign"]


def real_path(out: str | Path) -> Path:
    """Return the absolute path of an output. Links are followed here and nowhere later, so that all code means the same folder.

    Raises:
        UsageError: the name is too long, or it is a link to itself or into a folder that does not exist.
    """
    path = user_path(out).absolute()
    check_name(path)
    if not path.is_symlink():
        return Path(os.path.realpath(path))
    target = Path(os.path.realpath(path))
    if target.is_symlink() or not target.parent.is_dir():
        raise UsageError(
            f"{path} is a link to {target}, which cannot be created", hint="mount its disk, or choose another folder"
        )
    return target


def folder_kind(folder: Path) -> FolderKind:
    """Return what a folder is; one that cannot be read is ``foreign``."""
    try:
        names = [entry.name for entry in os.scandir(folder) if not is_scrap(entry.name)]
    except OSError:
        return "foreign"
    if not names:
        return "empty"
    if read_state(folder) is not None:
        return "working"
    if find_record(folder) is not None:
        return "result"
    return "run" if is_run(folder) else "foreign"


def is_scrap(name: str) -> bool:
    """Return whether a file is a lock or a half-written ``state.json``; a folder with nothing else counts as empty."""
    return name in LOCKS or (name.startswith(STATE + ".") and name.endswith(TEMPORARY))


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return the state of a working folder; None where there is none that upcycle wrote."""
    found = _read(folder / STATE)
    if found is None or not isinstance(found.get("fingerprint"), str):
        return None
    return found if found.items() >= MADE_BY.items() else None


def find_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a result; None where there is none that upcycle wrote."""
    for name in (RECORD, TRAINED):
        found = _read(folder / name)
        if found is not None and isinstance(found.get("versions"), dict) and "upcycle" in found["versions"]:
            return found
    return None


def is_run(folder: Path) -> bool:
    """Return whether the folder is that of a training run of upcycle."""
    if (found := _read(folder / RUN)) is not None and found.items() >= MADE_BY.items():
        return True
    for path in (folder / CHECKPOINTS).glob("step-*/trainer.json"):  # older versions wrote no run.json
        state = _read(path)
        if state is not None and {"identity", "recipe", "files"} <= set(state):
            return True
    return False


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return None if path.is_symlink() or not path.is_file() else read_json(path)
    except (OSError, UpcycleError):
        return None


def foreign_files(folder: Path) -> list[str]:
    """Return the names in a folder that upcycle did not write, or that were changed since: they would be lost with the folder.

    Where the folder is not a result with a list of its files, these are nearly all names in it.
    """
    record = find_record(folder) or {}
    files = record.get("files")
    listed: dict[str, str] = files if isinstance(files, dict) else {}
    found = []
    for path in sorted(folder.iterdir()):
        if path.name in _UNLISTED or (path.name == TRAINED and TRAINED not in listed and bool(listed)):
            continue
        whole = path.is_file() and not path.is_symlink()
        if whole and path.name in listed and hash_file(path) == listed[path.name]:
            continue
        if whole and path.name == _CARD and not _has_own_words(path):
            continue
        found.append(path.name)
    return found


def _has_own_words(card: Path) -> bool:
    """Return whether a user wrote a card, or wrote something into the section of a generated one that is theirs."""
    from upcycle.files.card_section import own_section

    try:
        section = own_section(card.read_text(encoding="utf-8"), card.name)
    except (UsageError, OSError, ValueError):
        return True
    return section is None or bool(section.strip())


def folder_identity(folder: Path) -> tuple[int, int, str] | None:
    """Return device, inode and record hashes of a folder; None where it is missing or empty.

    Two equal results mean the same folder with unchanged records.
    """
    if not folder.is_dir() or not contents(folder):
        return None
    found = folder.stat()
    records = [path for name in (RECORD, TRAINED, RUN, STATE) if (path := folder / name).is_file()]
    return found.st_dev, found.st_ino, "".join(map(hash_file, records))


def contents(folder: Path) -> list[str]:
    """Return the names in an output folder, without the locks and the working folder that upcycle has in it."""
    ours: set[str] = set()
    if not (folder / INSIDE).is_symlink() and folder_kind(folder / INSIDE) in ("working", "empty"):
        state = read_state(folder / INSIDE) or {}
        ours = {INSIDE, *([str(state["replaced"])] if state.get("inside") else [])}
    return sorted(entry.name for entry in os.scandir(folder) if not is_scrap(entry.name) and entry.name not in ours)


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an OUT whose content would be lost, or that cannot be written; ``overwrite`` allows replacing what upcycle wrote.

    Raises:
        UsageError: OUT is a file, is not empty, is somebody else's, or has an impossible name.
        EnvironmentFault: OUT cannot be read.
    """
    out = real_path(out)
    check_name(out)
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is a file, but the output is a folder", hint="choose another name")
        present = contents(out) if out.is_dir() else []
    except OSError as error:
        raise cannot_write(out, error) from None
    if not present:
        return
    kind = folder_kind(out)
    if kind == "working":
        if "finished" in (read_state(out) or {}):
            return  # a command was killed while it put OUT in place: the workspace completes that and checks again
        raise UsageError(
            f"{out} holds unfinished work of upcycle",
            hint="run the command that began it again, or choose another folder",
        )
    if kind == "foreign":
        some = ", ".join(present[:3]) + (", ..." if len(present) > 3 else "")
        raise UsageError(
            f"{out} is not empty, and upcycle did not write what is in it ({some})",
            hint="choose another folder; upcycle replaces only what it wrote",
        )
    if not overwrite:
        what = "a training run" if kind == "run" else "a model that upcycle wrote"
        raise UsageError(
            f"{out} is not empty: it holds {what}", hint="--overwrite replaces it once the new model is complete"
        )


def check_overwritable(path: Path, ours: Callable[[str], bool]) -> None:
    """Refuse to overwrite a file that upcycle did not write. A link is replaced, so that the file it points at stays.

    Args:
        path: the file.
        ours: tells from a file's text whether it is of the kind that will be written.

    Raises:
        UsageError: the file is somebody else's, is a folder, or its folder does not exist.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"no such folder: {path.parent}", hint="name a file in a folder that exists")
    if path.is_symlink() or not path.exists():
        return
    try:
        mine = path.is_file() and (not path.stat().st_size or ours(path.read_text(encoding="utf-8", errors="replace")))
    except OSError:
        mine = False
    if not mine:
        raise UsageError(f"{path} exists, and upcycle did not write it", hint="move it away, or choose another name")


def holds_keys(*keys: str) -> Callable[[str], bool]:
    """Return a test of whether a text is a JSON object with these keys."""

    def has_keys(text: str) -> bool:
        try:
            found = parse_json(text, "a file")
        except UpcycleError:
            return False
        return isinstance(found, dict) and set(keys) <= set(found)

    return has_keys


def check_apart(out: Path, kept: Path, what: str, inside: bool = False) -> None:
    """Refuse an OUT that is, or contains, the folder ``kept`` that is read; with ``inside``, also an OUT within that folder.

    Args:
        out: the output folder.
        kept: the folder or file that must not be overwritten.
        what: what ``kept`` is, for the message.
        inside: see above.

    Raises:
        UsageError: OUT and ``kept`` overlap.
    """
    out, kept = real_path(out), Path(os.path.realpath(kept))
    if out == kept or out in kept.parents:
        raise UsageError(f"{out} is or holds {what} {kept}", hint="choose another folder for the output")
    if inside and kept in out.parents:
        raise UsageError(f"{out} lies in {what} {kept}", hint="choose another folder for the output")


def cannot_write(path: Path, error: OSError) -> EnvironmentFault:
    """Return the error for a path that cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "free space on its disk, or choose another" if full else "choose a folder that you may write to"
    return EnvironmentFault(f"cannot write {path}: {error.strerror or error}", hint=hint)


def must_be_inside(out: Path) -> bool:
    """Return whether OUT exists and cannot be replaced by renaming another folder to it.

    That is so for a mount point, for the current folder or one that contains it, and in a folder that may not be written.
    """
    if not out.is_dir():
        return False
    return is_mount(out) or out in (here := _here(), *here.parents) or not os.access(out.parent, os.W_OK | os.X_OK)


def _here() -> Path:
    try:
        return Path(os.path.realpath(Path.cwd()))
    except OSError:  # it was removed
        return Path(os.sep)


def is_mount(path: Path) -> bool:
    """Return whether something is mounted at ``path``; on Linux, folders of the same disk that are mounted there count, too."""
    if path.is_mount():
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    return str(path) in {_unescaped(line.split(" ")[4]) for line in lines if line.count(" ") > 4}


def _unescaped(text: str) -> str:
    for code, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, plain)
    return text


def working_folder(out: Path) -> Path:
    """Return the working folder of OUT, whether or not it exists: beside OUT, or inside where OUT cannot be replaced by renaming."""
    beside, inside = sibling(out, ".partial"), out / INSIDE
    for found in (inside, beside):
        if not found.is_symlink() and folder_kind(found) == "working":
            return found
    return inside if must_be_inside(out) else beside
