"""Folders as upcycle writes them, for tests of what becomes of them: tests import it as ``folder_cases``."""

from __future__ import annotations

import json
from pathlib import Path

from upcycle.files.hashing import hash_file
from upcycle.files.output.workspace import Workspace

FILES = {"config.json": "{}", "model.safetensors": "weights", "recipe.yaml": "source: a"}


def fill(folder: Path, text: str) -> None:
    """A result as upcycle writes one."""
    for name, content in FILES.items():
        (folder / name).write_text(content + text)
    record = {"versions": {"upcycle": "1"}, "files": {name: hash_file(folder / name) for name in FILES}}
    (folder / "upcycle.json").write_text(json.dumps(record))


def result(out: Path, text: str) -> Path:
    out.mkdir(parents=True)
    fill(out, text)
    return out


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() if path.is_file() else "folder" for path in sorted(folder.iterdir())}


def make(out: Path, text: str = "new", **options: object) -> Path:
    """A whole job."""
    with Workspace(out, "job", **options) as workspace:  # type: ignore[arg-type]
        if not workspace.finished:
            (workspace.folder / "journal.jsonl").write_text("unit")
            fill(workspace.folder, text)
        return workspace.publish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
