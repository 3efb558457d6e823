"""Finds the recipes that come with upcycle by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from upcycle.errors import UsageError
from upcycle.files.formats.parsing import parse_yaml
from upcycle.files.locate import is_local
from upcycle.files.user_paths import user_path
from upcycle.recipe.configs_folder import configs_folder
from upcycle.recipe.conversion_recipe import read_recipe
from upcycle.recipe.model_recipes import model_recipes
from upcycle.recipe.validated import Model, validated
from upcycle.registry import did_you_mean

Verb = Literal["convert", "train", "grow"]
RECIPE_VERBS: tuple[Verb, ...] = ("convert", "train", "grow")
# What stands behind the name of a recipe for each verb.
_MORE: dict[Verb, str] = {
    "convert": "OUT --source SOURCE",
    "train": "--model MODEL --output OUT --set data=TEXT",
    "grow": "--source SEED --output OUT --set domains.NAME=TEXT",
}
_SUFFIXES = (".yaml", ".yml")
_NO_RECIPES = ("demo_model",)  # the settings with which the embedded model was trained, read by a module of its own


def shipped(verb: Verb) -> dict[str, Path]:
    """Return the files of the recipes for a verb, by name."""
    found = sorted(configs_folder(verb).glob("*.yaml"))
    return {path.stem: path for path in found if path.stem not in _NO_RECIPES}


def names_of_recipes(verb: Verb) -> list[str]:
    """Return the names of all recipes for a verb, those for single models last."""
    return [*shipped(verb), *(model_recipes() if verb == "convert" else ())]


def summary(path: Path) -> str:
    """Return the first line of a shipped recipe, which says what it is for."""
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def recipe_file(argument: str, verb: Verb) -> Path | None:
    """Find the recipe that a command's argument names: a YAML file, or one that comes with upcycle.

    A file in the current folder takes precedence over a recipe that comes with upcycle.

    Returns:
        The recipe's file; None where ``argument`` names no recipe, and may name something else, such as a source.

    Raises:
        UsageError: there is no such YAML file, or it is the name of a recipe for the other verb.
    """
    if argument.endswith(_SUFFIXES):
        path = user_path(argument)
        return path if path.exists() else _shipped(path.stem, verb, argument) if path.name == argument else path
    return None if is_local(argument) else _shipped(argument, verb)


def conversion_recipe(argument: str) -> tuple[str, dict[str, Any]] | None:
    """Return the conversion recipe that a command's argument names, with its name in messages; None where it names none.

    A file or folder in the current folder takes precedence over a recipe that comes with upcycle.

    Raises:
        UsageError: as :func:`recipe_file`, or the file is no recipe.
    """
    may_be_name = not (argument.endswith(_SUFFIXES) or "/" in argument or is_local(argument))
    if may_be_name and argument not in shipped("convert") and argument in model_recipes():
        return argument, parse_yaml(model_recipes()[argument].text, argument, error=UsageError)
    path = recipe_file(argument, "convert")
    return None if path is None else (str(path), read_recipe(path))


def needed_recipe_file(argument: str, verb: Verb) -> Path:
    """Find the recipe that a command's argument names, which may be a file with any ending.

    Raises:
        UsageError: there is no such recipe.
    """
    found = recipe_file(argument, verb)
    if found is not None:
        return found
    if user_path(argument).is_file():
        return user_path(argument)
    raise UsageError(f"no such recipe: {argument}", hint=recipe_hint(argument, verb))


def read_laid_over(
    model: type[Model],
    path: Path,
    verb: Verb,
    overlaid: Mapping[str, Any] | None,
    lay: Callable[[dict[str, Any], str, Any], None],
) -> Model:
    """Read a recipe, and lay single keys over it before it is validated.

    Args:
        model: the kind of recipe.
        path: its file, or the name of a recipe that comes with upcycle.
        verb: the command that it is for.
        overlaid: values by dotted path.
        lay: sets the key at a dotted path of a recipe of this kind.

    Raises:
        UsageError: the file is missing, not YAML, or no recipe of this kind.
    """
    found = needed_recipe_file(str(path), verb)
    content = read_recipe(found)
    for key, value in (overlaid or {}).items():
        lay(content, key, value)
    return validated(model, content, str(found))


def recipe_hint(argument: str, verb: Verb) -> str:
    """Return a hint with the shipped recipe that the user may have meant, and all there are."""
    models = "; or one for a model: upcycle list recipes" if verb == "convert" else ""
    return f"{did_you_mean(argument, names_of_recipes(verb))}a YAML file, or one of: {', '.join(shipped(verb))}{models}"


def _shipped(name: str, verb: Verb, argument: str | None = None) -> Path | None:
    """Return the file of a shipped recipe, or None.

    Raises:
        UsageError: the recipe is for the other verb; or ``argument``, a file's name, was given and there is no such recipe.
    """
    recipes = shipped(verb)
    if name in recipes:
        return recipes[name]
    for other in RECIPE_VERBS:
        if other != verb and name in names_of_recipes(other):
            raise UsageError(f"'{name}' is a recipe of upcycle {other}", hint=f"upcycle {other} {name} {_MORE[other]}")
    if argument:
        raise UsageError(f"no such recipe: {argument}", hint=recipe_hint(name, verb))
    return None
