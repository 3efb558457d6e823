"""Recipes for models that many people have: a shipped recipe, the model's name, and what ``upcycle plan`` says of both.

``configs/models/table.yaml`` names the models, which shipped recipe each of their recipes takes, and the few keys that differ; a
recipe's text is made from these when somebody asks for it, so that a change of the shipped one reaches all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import wrap
from typing import Any

from upcycle.errors import UsageError
from upcycle.files.formats.parsing import dump_yaml, read_yaml
from upcycle.recipe.configs_folder import configs_folder

_WIDTH = 118  # of a comment, behind its two characters


@dataclass(frozen=True)
class ModelRecipe:
    """Holds a recipe for one model.

    Attributes:
        name: what is typed: the model's short name, and what becomes of it.
        model: the short name.
        source: the model's hub id.
        what: one line that says what it makes.
        text: the recipe with its comments.
    """

    name: str
    model: str
    source: str
    what: str
    text: str


def table_file() -> Path:
    """Return the file that names the models."""
    return configs_folder("models") / "table.yaml"


@lru_cache
def model_recipes() -> dict[str, ModelRecipe]:
    """Return all recipes for single models, by name, a model's together."""
    table: dict[str, Any] = read_yaml(table_file(), error=UsageError)
    made = (
        _recipe(model, entry["source"], kind, recipe)
        for model, entry in table.items()
        for kind, recipe in entry["recipes"].items()
    )
    return {recipe.name: recipe for recipe in made}


def recipe_text(source: str, what: str, taken_from: str, keys: dict[str, Any], planned: dict[str, str]) -> str:
    """Return a shipped recipe as one for a model.

    Args:
        source: the model's hub id.
        what: the first line, which says what it makes.
        taken_from: the shipped recipe's name.
        keys: top-level keys whose values differ from that recipe's.
        planned: what ``upcycle plan`` prints, by the names of its lines.
    """
    _, _, rest = (configs_folder("convert") / f"{taken_from}.yaml").read_text(encoding="utf-8").partition("\n")
    for key, value in keys.items():
        rest, found = re.subn(rf"(?m)^{key}:.*$", dump_yaml({key: value}).rstrip("\n").replace("\\", r"\\"), rest)
        assert found == 1, f"{taken_from} has no line '{key}:'"
    facts = [
        line
        for name, text in planned.items()
        for line in wrap(f"{name:<12} {text}", _WIDTH, subsequent_indent=" " * 13, break_long_words=False)
    ]
    said = "".join(f"#   {line}\n" for line in facts)
    told = "another of its shape: --source FOLDER"
    return f"# {what}\n# upcycle {taken_from} with this model; upcycle plan says:\n{said}source: {source}  # {told}\n{rest}"


def _recipe(model: str, source: str, kind: str, entry: dict[str, Any]) -> ModelRecipe:
    text = recipe_text(source, entry["what"], entry["from"], entry.get("keys", {}), entry["plan"])
    return ModelRecipe(f"{model}-{kind}", model, source, entry["what"], text)
