"""Keeps this machine's paths out of what is published about a model, and remembers them beside it.

Records hold names: a hub repository's, or that of a folder or file without the folders around it. The paths that these names
stand for on this machine are in :data:`LOCAL_NAMES_FILE`, which :func:`upcycle.publishing.publishable_files.publishable` never
sends. A model from another machine lacks that file; there the user names the path with ``--source``.
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

LOCAL_NAMES_FILE = ".upcycle-local.json"
# Names of the embedded model and texts, and of text that a model writes itself, which no path may be given.
_TAKEN = ("demo", "prose", "code", "self")
# Keys whose values are prompts and never paths.
_WORDS = {"positive_prompts", "negative_prompts"}
_LONGEST_PATH = 4096


@dataclass(frozen=True)
class LocalNames:
    """Maps names to the paths of this machine that they stand for; ``paths`` has them as the user wrote them."""

    paths: dict[str, str]

    @classmethod
    def of(cls, *contents: Any) -> LocalNames:
        """Collect the paths in records or recipes, and give each a name that nothing else in them has."""
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
        """Return records with names in place of paths."""
        names = {path: name for name, path in self.paths.items()}
        return _replaced(content, lambda text: names.get(text, text))

    def remember(self, folder: Path, recipe: str) -> None:
        """Write names and absolute paths into ``folder``, marked as belonging to ``recipe``, the text of its recipe.yaml."""
        absolute = {name: _absolute(path) for name, path in self.paths.items()}
        content = {"about": _hash(recipe.encode()), "paths": absolute}
        (folder / LOCAL_NAMES_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _absolute(path: str) -> str:
    """Return a path, or each of those in ``MODEL+ADAPTER``, as it is found from every folder."""
    if user_path(path).exists() or "+" not in path:
        return str(user_path(path).absolute())
    return "+".join(str(user_path(part).absolute()) if user_path(part).exists() else part for part in path.split("+"))


def without_paths(content: Any) -> Any:
    """Return records with names in place of paths, where the paths need not be found again."""
    return LocalNames.of(content).published(content)


def records_without_folders(content: Any) -> Any:
    """Return records with names in place of paths, also of those inside sentences."""
    return _replaced(without_paths(content), private_text.text_without_folders)


def here(folder: Path, content: Any) -> Any:
    """Return a recipe or name from ``folder`` with the paths of this machine in place of names, where they are known."""
    paths = _remembered(folder)
    return _replaced(content, lambda text: paths.get(text, text)) if paths else content


def _remembered(folder: Path) -> dict[str, str]:
    recipe, file = folder / "recipe.yaml", folder / LOCAL_NAMES_FILE
    if not (recipe.is_file() and file.is_file()):
        return {}
    try:
        found = read_json(file)
    except CheckpointError:
        return {}
    paths = found.get("paths")
    if found.get("about") != _hash(recipe.read_bytes()) or not isinstance(paths, dict):
        return {}  # the names are those of another recipe
    return {name: path for name, path in paths.items() if isinstance(path, str)}


def is_path(text: str) -> bool:
    """Return whether a value of a record is a path of this machine, rather than a hub id or a name."""
    if not text.strip("/.~") or len(text) > _LONGEST_PATH or "\n" in text or "\0" in text or "://" in text:
        return False
    if path_in_value(text) or text.startswith(("./", "../")):
        return True
    try:
        return "/" in text and user_path(text).exists()
    except OSError:
        return False


def file_name(path: str) -> str:
    """Return the last part of a path; for ``.``, ``..`` and ``~`` the name of the folder that they stand for."""
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
