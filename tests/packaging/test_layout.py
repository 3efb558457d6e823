"""Import names, and the shape of the source tree."""

from __future__ import annotations

import ast
import importlib.util
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("upcycle", "splitters", "trainers", "kernels")
SHARED_NAMES = {
    *("F", "T"),  # type variables
    *("command", "main", "answer"),  # looked up by this name in every verb, program and worker
    *("activation", "experts_output", "forward", "backward"),  # one operation, implemented by several kernel backends
}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def tracked(pattern: str) -> list[Path]:
    return [ROOT / line for line in git("ls-files", pattern).splitlines()]


@pytest.mark.parametrize("name", ["kernels", "splitters", "trainers"])
def test_top_level_folders_are_not_importable_by_their_bare_name(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is None or spec.origin is not None
    if spec is not None and spec.origin is not None:
        assert ROOT not in Path(spec.origin).parents


def test_a_leaked_root_does_not_shadow_an_installed_kernels(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("real = True\n")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; import kernels; assert kernels.real"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["splitters", "trainers", "kernels", "configs"])
def test_links_are_relative_and_committed(name: str) -> None:
    """The tools that read types and lint follow them; installing does not (``test_installs.py``)."""
    (line,) = git("ls-files", "--stage", f"upcycle/{name}").splitlines()
    mode, blob, *_ = line.split()
    assert mode == "120000"
    assert git("cat-file", "blob", blob) == f"../{name}"


def test_files_are_small() -> None:
    lengths = [len(path.read_text().splitlines()) for folder in SOURCES for path in tracked(f"{folder}/*.py")]
    assert max(lengths) <= 400
    assert statistics.median(lengths) < 180


def test_public_definitions_say_what_they_do() -> None:
    bare = []
    for folder in SOURCES:
        for path in tracked(f"{folder}/*.py"):
            tree = ast.parse(path.read_text())
            for node in tree.body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                    bare += [f"{path.name}:{node.name}"] if not ast.get_docstring(node) else []
    assert not bare


def public_names(tree: ast.Module) -> Iterator[str]:
    """The classes, functions, constants and type aliases that a module defines for others."""
    for node in tree.body:
        names = [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        yield from (name for name in names if not name.startswith("_"))


def test_a_public_name_is_defined_once() -> None:
    """Two things of one name are mistaken for each other; a name that needs its module to be understood says too little."""
    places = defaultdict(set)
    for folder in SOURCES:
        for path in tracked(f"{folder}/*.py"):
            for name in public_names(ast.parse(path.read_text())):
                places[name].add(str(path.relative_to(ROOT)))
    repeated = {name: sorted(found) for name, found in places.items() if len(found) > 1}
    assert not {name: found for name, found in repeated.items() if name not in SHARED_NAMES}
    assert set(repeated) == SHARED_NAMES, "the list names what no longer repeats"


def test_no_pickle_and_no_remote_code() -> None:
    for folder in SOURCES:
        for path in tracked(f"{folder}/*.py"):
            text = path.read_text()
            assert "torch.load(" not in text, path
            assert "import pickle" not in text, path
            assert "trust_remote_code=True" not in text, path
