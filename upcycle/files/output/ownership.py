"""What a folder is: a result of upcycle, a training run, a working folder, or somebody else's, which is never touched.

A name proves nothing. A result carries ``upcycle.json`` (``training.json`` where it was exported from a run of another model), a
run ``run.json``, a working folder ``state.json``, each with what only this tool writes into it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.files.atomic_files import TEMPORARY
from upcycle.files.formats.parsing import parse_json, read_json
from upcycle.files.hashing import hash_file
from upcycle.files.local_names import FILE as LOCAL_FILE
from upcycle.files.names import LOCKS, RECORD, STATE, TRAINED, check_name, sibling
from upcycle.files.user_paths import user_path

RUN = "run.json"
CHECKPOINTS = "checkpoints"
INSIDE = "upcycle.partial"  # the working folder of an output that cannot be renamed, such as a mount point
REPLACED_INSIDE = "upcycle.replaced"
MADE_BY = {"made_by": "upcycle"}
# Files of a result that its record does not list, and that upcycle wrote or that systems leave behind.
_UNLISTED = {
    *(RECORD, "verification.json", "evaluation.json", "report.html", "report.json", STATE, ".DS_Store"),
    *LOCKS,
    LOCAL_FILE,
}
_CARD = "README.md"
Kind = Literal["empty", "result", "run", "working", "foreign"]


def real_path(out: str | Path) -> Path:
    """Where an output really is: links are followed once, here, so that everything after speaks of the same folder.

    Raises:
        UsageError: its name is too long, or it is a link in a circle, or to a place whose folder does not exist.
    """
    path = user_path(out).absolute()
    check_name(path)
    if not path.is_symlink():
        return Path(os.path.realpath(path))
    target = Path(os.path.realpath(path))
    if target.is_symlink() or not target.parent.is_dir():
        raise UsageError(
            f"{path} is a link to {target}, which cannot be made", hint="mount its disk, or choose another folder"
        )
    return target


def kind_of(folder: Path) -> Kind:
    """What a folder is. One that cannot be read is somebody else's."""
    try:
        names = [entry.name for entry in os.scandir(folder) if not is_scrap(entry.name)]
    except OSError:
        return "foreign"
    if not names:
        return "empty"
    if read_state(folder) is not None:
        return "working"
    if read_record(folder) is not None:
        return "result"
    return "run" if is_run(folder) else "foreign"


def is_scrap(name: str) -> bool:
    """Whether a name is that of a lock, or of a state that was being written: a folder with nothing else is empty."""
    return name in LOCKS or (name.startswith(STATE + ".") and name.endswith(TEMPORARY))


def read_state(folder: Path) -> dict[str, Any] | None:
    """The state of a working folder, or None: there is none, or not of upcycle."""
    found = _read(folder / STATE)
    if found is None or not isinstance(found.get("fingerprint"), str):
        return None
    return found if found.items() >= MADE_BY.items() else None


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a result, or None: there is none, or not of upcycle."""
    for name in (RECORD, TRAINED):
        found = _read(folder / name)
        if found is not None and isinstance(found.get("versions"), dict) and "upcycle" in found["versions"]:
            return found
    return None


def is_run(folder: Path) -> bool:
    """Whether a training run of upcycle lies in the folder itself."""
    if (found := _read(folder / RUN)) is not None and found.items() >= MADE_BY.items():
        return True
    for path in (folder / CHECKPOINTS).glob("step-*/trainer.json"):  # a run of an older version
        state = _read(path)
        if state is not None and {"identity", "recipe", "files"} <= set(state):
            return True
    return False


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return None if path.is_symlink() or not path.is_file() else read_json(path)
    except (OSError, UpcycleError):
        return None


def strangers(folder: Path) -> list[str]:
    """What lies in a folder and would be lost with it: names that upcycle did not write, or whose content is another now.

    All of them where the folder is no result with a list of its files.
    """
    record = read_record(folder) or {}
    files = record.get("files")
    listed: dict[str, str] = files if isinstance(files, dict) else {}
    found = []
    for path in sorted(folder.iterdir()):
        if path.name in _UNLISTED or (path.name == TRAINED and TRAINED not in listed and bool(listed)):
            continue
        whole = path.is_file() and not path.is_symlink()
        if whole and path.name in listed and hash_file(path) == listed[path.name]:
            continue
        if whole and path.name == _CARD and not _own_words(path):
            continue
        found.append(path.name)
    return found


def _own_words(card: Path) -> bool:
    """Whether somebody wrote into a card, or wrote it."""
    from upcycle.files.card_section import own_section

    try:
        own = own_section(card.read_text(encoding="utf-8"), card.name)
    except (UsageError, OSError, ValueError):
        return True
    return own is None or bool(own.strip())


def identity(folder: Path) -> tuple[int, int, str] | None:
    """Which folder it is and what it records; None where it is missing or empty. Two that are equal are the same, unchanged."""
    if not folder.is_dir() or not contents(folder):
        return None
    found = folder.stat()
    records = [path for name in (RECORD, TRAINED, RUN, STATE) if (path := folder / name).is_file()]
    return found.st_dev, found.st_ino, "".join(map(hash_file, records))


def contents(folder: Path) -> list[str]:
    """The names in an output folder, without the working folder and locks that are ours."""
    ours: set[str] = set()
    if not (folder / INSIDE).is_symlink() and kind_of(folder / INSIDE) in ("working", "empty"):
        state = read_state(folder / INSIDE) or {}
        ours = {INSIDE, *([str(state["replaced"])] if state.get("inside") else [])}
    return sorted(entry.name for entry in os.scandir(folder) if not is_scrap(entry.name) and entry.name not in ours)


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an OUT that would be lost, or that can never be written; ``overwrite`` replaces only what upcycle wrote.

    Raises:
        UsageError: OUT is a file, is not empty, is somebody else's, or cannot be.
        EnvironmentFault: OUT cannot be read.
    """
    out = real_path(out)
    check_name(out)
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is a file, and the output is a folder", hint="choose another name")
        present = contents(out) if out.is_dir() else []
    except OSError as error:
        raise cannot_write(out, error) from None
    if not present:
        return
    kind = kind_of(out)
    if kind == "working":
        if "finished" in (read_state(out) or {}):
            return  # a killed command had put it there: what opens OUT completes that first, and looks again
        raise UsageError(
            f"{out} holds unfinished work of upcycle",
            hint="give the command that began it again, or choose another folder",
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


def check_file(path: Path, ours: Callable[[str], bool]) -> None:
    """Refuse to write a file over one that upcycle did not write; a link is replaced, and so what it points at stays.

    Args:
        path: the file.
        ours: whether a text is of the kind that will be written.

    Raises:
        UsageError: it is somebody else's, a folder, or its folder does not exist.
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
        raise UsageError(f"{path} is there, and upcycle did not write it", hint="move it away, or choose another name")


def holds_keys(*keys: str) -> Callable[[str], bool]:
    """Whether a text is JSON with these keys."""

    def told(text: str) -> bool:
        try:
            found = parse_json(text, "a file")
        except UpcycleError:
            return False
        return isinstance(found, dict) and set(keys) <= set(found)

    return told


def check_apart(out: Path, kept: Path, what: str, inside: bool = False) -> None:
    """Refuse an OUT that is something that is read, or holds it; with ``inside`` one that lies within it, too.

    Raises:
        UsageError: they are not apart.
    """
    out, kept = real_path(out), Path(os.path.realpath(kept))
    if out == kept or out in kept.parents:
        raise UsageError(f"{out} is or holds {what} {kept}", hint="choose another folder for the output")
    if inside and kept in out.parents:
        raise UsageError(f"{out} lies in {what} {kept}", hint="choose another folder for the output")


def cannot_write(path: Path, error: OSError) -> EnvironmentFault:
    """The error for a folder that cannot be written."""
    return EnvironmentFault(f"cannot write {path}: {error.strerror or error}", hint="choose a folder you may write to")


def must_be_inside(out: Path) -> bool:
    """Whether OUT exists and cannot be given to another folder by renaming: a mount point, where we stand, or in a folder
    that may not be written.
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
    """Whether something is mounted there; Linux also tells of folders of the same disk."""
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
    """Where the unfinished result of OUT is, or would be: beside it, or inside where it cannot be renamed."""
    beside, inside = sibling(out, ".partial"), out / INSIDE
    for found in (inside, beside):
        if not found.is_symlink() and kind_of(found) == "working":
            return found
    return inside if must_be_inside(out) else beside
