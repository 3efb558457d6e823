"""Where things lie on this machine is kept beside a model, and out of everything that is published of it.

Records hold names: of a hub's repository, of a folder or a file without the folders around it. What they stand for here is in
:data:`FILE`, which :func:`upcycle.publishing.publishable_files.publishable` never sends; without it (a model from elsewhere)
``--source`` says it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from upcycle.errors import CheckpointError
from upcycle.files import private_text
from upcycle.files.formats.parsing import read_json
from upcycle.files.private_text import path_in_value
from upcycle.files.user_paths import user_path

FILE = ".upcycle-local.json"
# Names that mean something of their own: the embedded model and texts. (Others in the same record are not taken either.)
_TAKEN = ("demo", "prose", "code")
# Text that somebody wrote, which names nothing.
_WORDS = {"positive_prompts", "negative_prompts"}
_LONGEST_PATH = 4096


@dataclass(frozen=True)
class LocalNames:
    """Paths of this machine (as they were written) by the names that stand for them."""

    paths: dict[str, str]

    @classmethod
    def of(cls, *contents: Any) -> LocalNames:
        """Those in records or recipes: every string that is a path, or that lies on this machine."""
        paths: dict[str, str] = {}
        found = dict.fromkeys(text for content in contents for text in _strings(content))
        taken = {*_TAKEN, *(text for text in found if not is_path(text))}
        for text in filter(is_path, found):
            name = base = file_name(text)
            number = 1
            while name in paths or name in taken:
                number += 1
                name = f"{base}-{number}"
            paths[name] = text
        return cls(paths)

    def published(self, content: Any) -> Any:
        """Records with names in place of paths."""
        names = {path: name for name, path in self.paths.items()}
        return _replaced(content, lambda text: names.get(text, text))

    def remember(self, folder: Path, recipe: str) -> None:
        """Keep them in ``folder``, beside the recipe (its text) that has the names."""
        absolute = {name: str(user_path(path).absolute()) for name, path in self.paths.items()}
        content = {"about": _hash(recipe.encode()), "paths": absolute}
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def without_paths(content: Any) -> Any:
    """Records with names in place of paths, of which nobody needs to know where they were."""
    return LocalNames.of(content).published(content)


def without_folders(content: Any) -> Any:
    """The same, also of paths that stand in sentences."""
    return _replaced(without_paths(content), private_text.without_folders)


def here(folder: Path, content: Any) -> Any:
    """A recipe or name in ``folder`` with the paths that its names stand for on this machine, where that is known."""
    paths = _remembered(folder)
    return _replaced(content, lambda text: paths.get(text, text)) if paths else content


def _remembered(folder: Path) -> dict[str, str]:
    recipe, file = folder / "recipe.yaml", folder / FILE
    if not (recipe.is_file() and file.is_file()):
        return {}
    try:
        found = read_json(file)
    except CheckpointError:
        return {}
    paths = found.get("paths")
    if found.get("about") != _hash(recipe.read_bytes()) or not isinstance(paths, dict):
        return {}  # of another recipe
    return {name: path for name, path in paths.items() if isinstance(path, str)}


def is_path(text: str) -> bool:
    """Whether a value of a record is a path of this machine, and no id of a hub."""
    if not text.strip("/.~") or len(text) > _LONGEST_PATH or "\n" in text or "\0" in text or "://" in text:
        return False
    if path_in_value(text) or text.startswith(("./", "../")):
        return True
    try:
        return "/" in text and user_path(text).exists()
    except OSError:
        return False


def file_name(path: str) -> str:
    """The last part of a path, that of a folder that is called ``.`` or ``..`` too."""
    if "\\" in path or re.match(r"[A-Za-z]:", path):
        return PureWindowsPath(path).name or "folder"
    name = Path(path).name
    return (user_path(path).resolve().name if name in ("", ".", "..", "~") else name) or "folder"


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _strings(key)
            if key not in _WORDS:
                yield from _strings(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _strings(value)


def _replaced(content: Any, replace: Callable[[str], str]) -> Any:
    if isinstance(content, str):
        return replace(content)
    if isinstance(content, dict):
        return {
            _replaced(key, replace): value if key in _WORDS else _replaced(value, replace)
            for key, value in content.items()
        }
    return [_replaced(value, replace) for value in content] if isinstance(content, (list, tuple)) else content


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
