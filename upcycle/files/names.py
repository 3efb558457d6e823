"""Names the files of an output, and makes names beside another that fit on the disk and are free."""

from __future__ import annotations

import hashlib
import os
from itertools import count
from pathlib import Path

from upcycle.errors import UsageError

RECORD = "upcycle.json"
DECISION_FILE = "growth.json"  # what a growth step decided
TRAINED = "training.json"
STATE = "state.json"
MEASURED = "measured.jsonl"  # the measurements that decided merges
WRITTEN = "written_text.safetensors"  # the calibration tokens that the model wrote itself
JOURNAL = "journal.jsonl"
UNFINISHED = (STATE, JOURNAL, MEASURED, WRITTEN)  # files that only an unfinished output holds
LOCK = ".lock"
PID_LOCK = ".lock.pid"
LOCKS = (LOCK, PID_LOCK)

_LONGEST = 255  # bytes of a name, on systems that do not tell their limit
_LONGEST_PATH = 4096
_INSIDE = 96  # bytes of the longest name that is written into an output folder, and its separator


def sibling(path: Path, suffix: str) -> Path:
    """Return ``path`` with ``suffix`` added to its name; a name too long for its disk is cut, and a hash keeps it distinct."""
    name = path.name + suffix
    most = _longest(path.parent, "PC_NAME_MAX", _LONGEST)
    if len(os.fsencode(name)) <= most:
        return path.with_name(name)
    mark = "~" + hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    kept = os.fsencode(path.name)[: most - len(mark) - len(os.fsencode(suffix))]
    return path.with_name(kept.decode("utf-8", "ignore") + mark + suffix)


def free_sibling(path: Path, suffix: str) -> Path:
    """Return the first of ``NAME.suffix``, ``NAME.2.suffix``, ``NAME.3.suffix``, ... where nothing is, not even a dangling link."""
    for number in count(1):
        found = sibling(path if number == 1 else path.with_name(f"{path.name}.{number}"), suffix)
        if not os.path.lexists(found):
            return found
    raise AssertionError("count() does not end")


def check_name(path: Path) -> None:
    """Refuse a path that cannot be the name of an output folder.

    Raises:
        UsageError: it is no name, or it or the paths of its files would be too long for its disk.
    """
    if not path.name or "\0" in str(path):
        raise UsageError(f"{str(path)!r} cannot be the name of an output", hint="name a folder that can be created")
    most = _longest(path.parent, "PC_NAME_MAX", _LONGEST)
    if (length := len(os.fsencode(path.name))) > most:
        raise UsageError(
            f"the output's name has {length} bytes, and this disk allows {most}: {path.name[:40]}...",
            hint="choose a shorter name",
        )
    longest = _longest(path.parent, "PC_PATH_MAX", _LONGEST_PATH)
    if (length := len(os.fsencode(path)) + _INSIDE) > longest:
        raise UsageError(
            f"the output's path is too long: with its files it has {length} bytes, and this system allows {longest}",
            hint="choose a folder nearer to the root",
        )


def _longest(folder: Path, limit: str, otherwise: int) -> int:
    """Return the limit called ``limit`` of the disk on which ``folder`` is or will be; ``otherwise`` where it is not known."""
    while not os.path.exists(folder) and folder != folder.parent:  # noqa: PTH110 - Path.exists raises where it is too long
        folder = folder.parent
    try:
        return int(os.pathconf(folder, limit))
    except (AttributeError, OSError, ValueError):  # Windows, and file systems that do not know
        return otherwise
