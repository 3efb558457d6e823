"""The house: no circle of imports, no crowded folder, and every room has its line in the page that describes them."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("upcycle", "splitters", "trainers", "kernels")
ARCHITECTURE = ROOT / "docs" / "develop" / "architecture.md"
CROWDED = 18  # modules in one folder


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
    files = source_files()
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

    def room(path: str) -> str:
        return "/".join(path.split("/")[:-1][:depth])

    arrows: dict[str, set[str]] = {}
    for path, others in graph.items():
        arrows.setdefault(room(path), set()).update(room(other) for other in others)
    return {name: others - {name} for name, others in arrows.items()}


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert folded({"x/a.py": {"y/b.py"}, "y/b.py": set(), "y/c.py": {"x/a.py"}}) == {"x": {"y"}, "y": {"x"}}
    text = "def f():\n    from upcycle.a import B\n"
    assert list(imported(text, {"upcycle.a": "upcycle/a.py"})) == ["upcycle/a.py"]


def test_no_files_import_each_other() -> None:
    assert circles(imports()) == []


def test_no_folders_import_each_other() -> None:
    assert circles(folded(imports())) == []


def test_no_folder_is_crowded() -> None:
    count = Counter(str(Path(path).parent) for path in source_files())
    assert {name: modules for name, modules in count.items() if modules > CROWDED} == {}


def test_every_room_is_described() -> None:
    """One line each: `folder/`, a dash or a colon, and what it is for."""
    described = re.findall(r"^[-|*]?\s*`([\w/]+)/`", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    rooms = {str(Path(path).parent) for path in source_files()}
    assert sorted(described) == sorted(set(described))
    assert set(described) == rooms
