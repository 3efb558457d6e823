"""What the sources import, by file and by room: for the tests of the house and for traces of a way through it."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("upcycle", "splitters", "trainers", "kernels")


def source_files() -> list[str]:
    """Every module of the sources, as a path from the root."""
    listing = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in listing.stdout.splitlines() if line.split("/")[0] in SOURCES]


def module_name(path: str) -> str:
    """``trainers/run/loop.py`` is imported as ``upcycle.trainers.run.loop``."""
    parts = path.removesuffix(".py").split("/")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts if parts[0] == "upcycle" else ["upcycle", *parts])


def imported(text: str, modules: Mapping[str, str]) -> Iterator[str]:
    """Paths of the modules that a file imports, wherever in it: in functions and for types alone, too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found = modules.get(name) or modules.get(node.module)
                if found:
                    yield found
        elif isinstance(node, ast.Import):
            yield from (modules[alias.name] for alias in node.names if alias.name in modules)


def imports() -> dict[str, set[str]]:
    """What every module imports. The lists of plug-ins and of public functions name modules in strings: they import none."""
    files = [
        path for path in source_files() if path != "upcycle/__main__.py"
    ]  # which is the command line, and imported by nobody
    modules = {module_name(path): path for path in files}
    public = "upcycle/__init__.py"  # its imports for type checkers are the public functions of all rooms
    return {
        path: set(imported((ROOT / path).read_text(encoding="utf-8"), modules)) - {path} if path != public else set()
        for path in files
    }


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups that reach each other (Tarjan's strongly connected components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def folded(graph: Mapping[str, set[str]], depth: int | None = None) -> dict[str, set[str]]:
    """The same between folders, or between the first ``depth`` folders of their paths."""

    arrows: dict[str, set[str]] = {}
    for path, others in graph.items():
        arrows.setdefault(room_of(path, depth), set()).update(room_of(other, depth) for other in others)
    return {name: others - {name} for name, others in arrows.items()}


def room_of(path: str, depth: int | None = None) -> str:
    """The folder of a module's path, or of that the first ``depth`` folders."""
    return "/".join(path.split("/")[:-1][:depth])


def stands_on(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """What everything in a graph without circles imports, directly or through others."""
    found: dict[str, set[str]] = {}

    def below(node: str) -> set[str]:
        if node not in found:
            found[node] = set()
            for other in graph.get(node, ()):
                found[node] |= {other} | below(other)
        return found[node]

    for node in graph:
        below(node)
    return found
