"""Import names, the wheel, and the shape of the source tree."""

from __future__ import annotations

import ast
import importlib.util
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("upcycle", "splitters", "trainers", "kernels")


def tracked(pattern: str) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / line for line in listing.stdout.splitlines()]


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
    link = ROOT / "upcycle" / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"


def test_the_wheel_holds_every_module_and_the_demo(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        (Path("upcycle") / path.relative_to(ROOT)).as_posix()
        if folder != "upcycle"
        else path.relative_to(ROOT).as_posix()
        for folder in SOURCES
        for path in tracked(f"{folder}/**.py") + tracked(f"{folder}/*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    data = {
        path.relative_to(ROOT / "upcycle").as_posix() for path in tracked("upcycle/demo/**") if path.suffix != ".py"
    }
    data |= {
        path.relative_to(ROOT / "upcycle").as_posix()
        for kind in ("html", "css")
        for path in tracked(f"upcycle/report/templates/*.{kind}")
    }
    data |= {f"configs/{path.relative_to(ROOT / 'configs').as_posix()}" for path in tracked("configs/**.yaml")}
    assert {f"upcycle/{name}" for name in data} <= names
    assert wheel.stat().st_size < 10_000_000


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


def test_no_pickle_and_no_remote_code() -> None:
    for folder in SOURCES:
        for path in tracked(f"{folder}/*.py"):
            text = path.read_text()
            assert "torch.load(" not in text, path
            assert "import pickle" not in text, path
            assert "trust_remote_code=True" not in text, path
