"""The recipes that come with upcycle, and how a command finds one by its name."""

from __future__ import annotations

import difflib
from importlib import import_module
from pathlib import Path
from typing import Literal

from upcycle.errors import UsageError
from upcycle.files.locate import is_local
from upcycle.files.user_paths import user_path

Verb = Literal["convert", "train"]
VERBS: tuple[Verb, ...] = ("convert", "train")
_SUFFIXES = (".yaml", ".yml")
_NO_RECIPES = ("demo_model",)  # what the embedded model was trained by, for a module of its own


def shipped(verb: Verb) -> dict[str, Path]:
    """The files of the recipes for ``upcycle convert`` or ``upcycle train``, by name."""
    folder = Path(import_module(f"upcycle.configs.{verb}").__path__[0])  # beside upcycle/ in a checkout without links
    found = sorted(folder.glob("*.yaml"))
    return {path.stem: path for path in found if path.stem not in _NO_RECIPES}


def summary(path: Path) -> str:
    """The first line of a shipped recipe, which says what it is for."""
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def recipe_file(told: str, verb: Verb) -> Path | None:
    """The recipe that a command was told: a YAML file, or the name of one that comes with upcycle.

    What lies in the current folder goes before what came with upcycle.

    Returns:
        Its file; ``None`` where ``told`` is neither, and may be something else, such as a source.

    Raises:
        UsageError: there is no such YAML file, or it is the name of a recipe for the other verb.
    """
    if told.endswith(_SUFFIXES):
        path = user_path(told)
        return path if path.exists() else _shipped(path.stem, verb, told) if path.name == told else path
    return None if is_local(told) else _shipped(told, verb)


def needed_recipe_file(told: str, verb: Verb) -> Path:
    """The same where nothing but a recipe will do; files of any name are taken.

    Raises:
        UsageError: there is no such recipe.
    """
    found = recipe_file(told, verb)
    if found is not None:
        return found
    if user_path(told).is_file():
        return user_path(told)
    raise UsageError(f"no such recipe: {told}", hint=recipe_hint(told, verb))


def recipe_hint(told: str, verb: Verb) -> str:
    """Which shipped recipe the user may have meant, and all there are."""
    close = difflib.get_close_matches(told, shipped(verb), n=1)
    meant = f"did you mean '{close[0]}'? " if close else ""
    return f"{meant}a YAML file, or one of: {', '.join(shipped(verb))}"


def _shipped(name: str, verb: Verb, told: str | None = None) -> Path | None:
    """
    Raises:
        UsageError: it is for the other verb; or ``told``, the file's name, is no recipe of upcycle's either.
    """
    own = shipped(verb)
    if name in own:
        return own[name]
    for other in VERBS:
        if name in shipped(other):
            more = " --model MODEL --output OUT --set data=TEXT" if other == "train" else " OUT --source SOURCE"
            raise UsageError(f"'{name}' is a recipe of upcycle {other}", hint=f"upcycle {other} {name}{more}")
    if told:
        raise UsageError(f"no such recipe: {told}", hint=recipe_hint(name, verb))
    return None
