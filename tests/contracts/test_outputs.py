"""Every verb that writes a folder or a file asks the one place that knows whose it is; none has a way of its own."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from training_runs import recipe_for, run

import upcycle
from upcycle.cli.main import cli

PACKAGE = Path(upcycle.__file__).parent
# Renaming, removing trees and locking are done here, and in files of upcycle's own making within a folder that these have opened.
FOLDERS = {
    "files/output/placing.py",
    "files/output/scratch.py",
    "files/output/workspace.py",
    "trainers/checkpoints/write.py",
    "trainers/run/run_folder.py",
}
LOCKS = {"files/output/locks.py"}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for folder, _, names in os.walk(PACKAGE, followlinks=True):
        for name in names:
            path = Path(folder) / name
            if path.suffix == ".py":
                yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.long
def test_trees_are_removed_and_locks_taken_in_one_place() -> None:
    removing, locking = set(), set()
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("rmtree", "copytree"):
                removing.add(name)
            if isinstance(node, (ast.Import, ast.ImportFrom)) and re.search("fcntl|filelock|msvcrt", ast.dump(node)):
                locking.add(name)
    assert removing <= FOLDERS, (
        f"folders are replaced through upcycle.files.output.workspace: {sorted(removing - FOLDERS)}"
    )
    assert locking == LOCKS, f"locks are taken through upcycle.files.output.locks: {sorted(locking - LOCKS)}"


@pytest.fixture
def commands(
    pico: Callable[[str], Path], pico_moe: Callable[..., Path], branches: Any, tmp_path: Path
) -> dict[str, Any]:
    """Verb -> its arguments for an OUT."""
    recipe = recipe_for(pico_moe("mixtral"), tmp_path / "trained", stage={"steps": 1, "losses": {}})
    (tmp_path / "train.yaml").write_text(recipe.dump())
    llama, sources = str(pico("llama")), ",".join(map(str, branches(2)))
    checked = ["--verify-tokens", "64", "-q"]
    return {
        "convert": lambda out: ["convert", llama, out, "--experts", "2", *checked],
        "mix": lambda out: ["convert", out, "--sources", sources, "-m", "branch_train_mix", "-k", "1", *checked],
        "grow": lambda out: ["convert", llama, out, "-m", "depth_stack", "--param", "growth=2", *checked],
        "demo": lambda out: ["demo", out, "-q"],
        "train": lambda out: ["train", str(tmp_path / "train.yaml"), "--output", out, "-q"],
        "export": lambda out: ["export", _trained(recipe), out, "-q"],
        "report": lambda out: ["report", llama, "--out", f"{out}/page.html", "-q"],
        "compare": lambda out: ["compare", llama, "--out", f"{out}/table.json", "-q"],
    }


def _trained(recipe: Any) -> str:
    if not (Path(recipe.output) / "checkpoints").exists():
        run(recipe)
    return str(recipe.output)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("verb", ["convert", "mix", "grow", "demo", "train", "export", "report", "compare"])
def test_what_is_somebody_elses_is_refused_before_any_work(
    commands: dict[str, Any], verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mine"
    names = {
        "demo": ["upcycled/config.json"],
        "train": ["recipe.yaml"],
        "report": ["page.json"],
        "compare": ["table.json"],
    }.get(verb, ["config.json", "model.safetensors"])
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"mine": true}')
    options = ["--overwrite"] if verb in ("convert", "mix", "grow", "export") else []
    arguments = commands[verb](str(out))

    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    for place in (
        "upcycle.conversion.convert._write_weights",
        "upcycle.trainers.checkpoints.export._write_weights",
        "upcycle.trainers.run.loop.Stage",
    ):
        monkeypatch.setattr(place, worked)
    for extra in ([], options):
        result = CliRunner().invoke(cli, [*arguments, *extra], standalone_mode=False)
        error = result.exception
        assert error is not None, result.output
        assert getattr(error, "exit_code", None) == 2, repr(error)
        assert "upcycle did not write" in str(error) or "was not written by" in str(error) or "is a model" in str(error)
        assert "--overwrite" not in str(getattr(error, "hint", ""))
    assert all((out / name).read_text() == '{"mine": true}' for name in names)
    assert {path.name for path in tmp_path.iterdir()} <= {"mine", "trained", "train.yaml"}
