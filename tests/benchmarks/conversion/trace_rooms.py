"""Traces which rooms a conversion of the demo model walks through, in the order in which a reader meets its functions.

    python tests/benchmarks/conversion/trace_rooms.py --recipe copies --levels 2
    python tests/benchmarks/conversion/trace_rooms.py --recipe split_50

A room is a folder; ``--levels 2`` folds rooms to the first two folders of their paths. A function is met when it is called
for the first time, and every later call of it is passed over: who reads along has read it. So neither layers nor tokens
count. One line is printed per change of room: the room, and the functions that are met there before the next change.
Left out are generators (they run at their consumer's pace), lambdas and comprehensions, bodies of classes and modules
(they run when they are imported), ``upcycle.progress`` (it is called from everywhere) and all code that is not ours.

Counted at the end:

- rooms: how many different ones there are;
- changes: how often a function is met in another room than the one before it;
- forwards: changes to a room that was not entered before, which is as many as there are rooms;
- returns: changes to a room that was entered and left before (changes - forwards);
- climbs: changes to a room that stands above the one just left, that is, one that imports it, directly or through others;
- calls upwards: different pairs of functions of which the caller's room is imported by the called one's: callbacks, and
  classes that are handed to a room below that knows only their protocol.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))  # run as a script, it has no pythonpath

from import_graph import SOURCES, folded, imports, room_of, stands_on

RECIPES: dict[str, dict[str, Any]] = {
    "copies": {"experts": 4, "top_k": 2},
    "split_50": {
        "method": "alternating",
        "parameters": {"tokens": 512},
        "active": 0.5,
        "pieces": 12,
        "layers": "except-first:1",
        "shared_unheld": "route",
        "router": {"name": "ridge", "parameters": {"tokens": 512}},
        "refit": "down",
        "calibration": {"text": "demo", "tokens": 512, "window": 64},
    },
}
SILENT = {"upcycle/progress.py"}


@dataclass(frozen=True)
class Met:
    """A function at its first call, by the path of its file, and who called it then."""

    path: str
    name: str
    caller: str | None


class Trace:
    """Keeps the first call of every function below ``root``; to be given to :func:`sys.setprofile`.

    Args:
        root: the folder that holds the sources.
        moved: path of a file -> the path that it counts as.
    """

    def __init__(self, root: Path, moved: Mapping[str, str] | None = None) -> None:
        self._root, self._moved = root.resolve(), moved or {}
        self._paths: dict[str, str | None] = {}
        self._seen: set[CodeType] = set()
        self.met: list[Met] = []
        self.calls: set[tuple[str, str, str]] = set()  # caller's path, called path and function

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """Note a call."""
        if event != "call":
            return
        code = frame.f_code
        path = self._path(code)
        if path is None or path in SILENT or not _is_read(code):
            return
        caller = self._caller(frame)
        if caller is not None:
            self.calls.add((caller, path, _name(code)))
        if code not in self._seen:
            self._seen.add(code)
            self.met.append(Met(path, _name(code), caller))

    def _caller(self, frame: FrameType) -> str | None:
        """The path of the nearest caller of ours."""
        before = frame.f_back
        while before is not None:
            path = self._path(before.f_code)
            if path is not None and before.f_code.co_name != "<module>":
                return path
            before = before.f_back
        return None

    def _path(self, code: CodeType) -> str | None:
        """The path of a function's file from the root; None: it is not ours."""
        name = code.co_filename
        if name not in self._paths:
            found = Path(name).resolve()
            path = found.relative_to(self._root).as_posix() if found.is_relative_to(self._root) else None
            ours = path is not None and path.split("/")[0] in SOURCES
            self._paths[name] = self._moved.get(path, path) if ours and path is not None else None
        return self._paths[name]


def _name(code: CodeType) -> str:
    """A function's name, with its class from Python 3.11 on."""
    return getattr(code, "co_qualname", code.co_name)


def _is_read(code: CodeType) -> bool:
    """Whether it is a function with a name: no class body, module, lambda, comprehension or generator."""
    is_function = code.co_flags & inspect.CO_OPTIMIZED
    return bool(is_function) and not code.co_flags & inspect.CO_GENERATOR and not code.co_name.startswith("<")


def walk(met: list[Met], levels: int | None) -> Iterator[tuple[str, list[Met]]]:
    """Every room in the order in which it is entered, with the functions that are met there."""
    for room, group in itertools.groupby(met, key=lambda one: room_of(one.path, levels)):
        yield room, list(group)


def counts(trace: Trace, below: Mapping[str, set[str]], levels: int | None) -> dict[str, int]:
    """The counts of this file's first lines. ``below`` is what every room imports, directly or through others."""
    rooms = [room for room, _ in walk(trace.met, levels)]
    upwards = [call for call in trace.calls if room_of(call[0], levels) in below.get(room_of(call[1], levels), ())]
    return {
        "functions": len(trace.met),
        "rooms": len(set(rooms)),
        "changes": len(rooms),
        "forwards": len(set(rooms)),
        "returns": len(rooms) - len(set(rooms)),
        "climbs": sum(before in below.get(after, ()) for before, after in itertools.pairwise(rooms)),
        "calls upwards": len(upwards),
    }


def traced(run: Callable[[], object], trace: Trace) -> None:
    """Run something under ``trace``."""
    sys.setprofile(trace)
    try:
        run()
    finally:
        sys.setprofile(None)


def main(moved: Mapping[str, str] | None = None) -> int:
    """Trace one conversion; of an older tree ``moved`` says which of today's files each of its files is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="copies", help="what is converted")
    parser.add_argument("--levels", type=int, help="fold rooms to so many folders of their paths")
    parser.add_argument("--counts-only", action="store_true", help="print the counts alone")
    asked = parser.parse_args()
    import upcycle

    trace = Trace(Path(upcycle.__file__).parents[1], moved)
    with tempfile.TemporaryDirectory() as folder:
        traced(lambda: upcycle.convert("demo", Path(folder) / "out", **RECIPES[asked.recipe]), trace)
    if not asked.counts_only:
        for room, group in walk(trace.met, asked.levels):
            print(f"{room:28} {', '.join(f'{Path(one.path).stem}.{one.name}' for one in group)}")
    found = counts(trace, stands_on(folded(imports(), asked.levels)), asked.levels)
    print(", ".join(f"{name} {number}" for name, number in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
