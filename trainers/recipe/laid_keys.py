"""Lays single keys over a training recipe, as ``--set`` names them: by dotted paths."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from upcycle.errors import UsageError
from upcycle.trainers.recipe.data_recipe import written_out

STAGE_NAME = "train"  # of a stage that is given none


def lay(content: Any, path: str, value: Any, stage_keys: Collection[str]) -> None:
    """Set the key at a dotted path of a recipe to ``value``.

    A stage is named by its number, from 0, or by its name (``train`` if it has none). A single stage may be left out of the path:
    ``stages.train=[router]`` then sets its key ``train``, while ``stages.train.steps`` means the stage of that name. Short forms on
    the way (``data: FILE``, a single stage, domains by name) are written out first, so that keys below them can be set.

    Args:
        content: the recipe.
        path: the key.
        value: its new value.
        stage_keys: the keys that a stage may have.

    Raises:
        UsageError: no stage or domain has that name.
    """
    *parents, last = path.split(".")
    holder: Any = None
    key: Any = None
    for place, parent in enumerate(parents):
        holder, key = content, parent
        if isinstance(content, list):
            key = _place(content, parent, path)
            content = content[key]
        else:
            content = content.get(parent)
        if parent == "stages" and place == 0 and isinstance(content, (dict, list)):
            content = [content] if isinstance(content, dict) else content
            word, more = path.split(".")[1], path.count(".") > 1
            named = more and word == (content[0].get("name", STAGE_NAME) if content else None)
            if len(content) == 1 and word in stage_keys and not named:
                holder[key] = content
                holder, key, content = content, 0, content[0]
        elif parent == "data" and content is not None:
            content = written_out(content)
        elif not isinstance(content, (dict, list)):
            content = {}
        holder[key] = content
    if isinstance(content, list):
        content[_place(content, last, path)] = value
    else:
        content[last] = value


def _place(listed: list[Any], word: str, path: str) -> int:
    unnamed = STAGE_NAME if path.startswith("stages.") else None
    names = [item.get("name", unnamed) if isinstance(item, dict) else None for item in listed]
    if word in names:
        return names.index(word)
    if word.isdigit() and int(word) < len(listed):
        return int(word)
    known = ", ".join(str(name or number) for number, name in enumerate(names))
    raise UsageError(f"{path}: there is no '{word}'", hint=f"use one of {known}")
