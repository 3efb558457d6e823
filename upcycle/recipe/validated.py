"""A mapping of keys -> a pydantic model, with errors that name the key and the file: of recipes, and of plug-ins' parameters."""

from __future__ import annotations

from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from upcycle.errors import UsageError
from upcycle.registry import suggestion

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], content: Any, where: str) -> Model:
    """Validate a mapping, and return it as ``model``.

    Args:
        model: a recipe, or the parameters of a plug-in.
        content: the mapping, or a short form that the model knows.
        where: what it comes from, for messages.

    Raises:
        UsageError: it is no mapping, a key is unknown or missing, or a value is wrong; names the key's path, the value and ``where``.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _error(error, where, model) from None


def _error(error: ValidationError, where: str, model: type[BaseModel]) -> UsageError:
    found = error.errors(include_url=False)
    # A misspelt key is reported as unknown and the right one as missing; the former says more.
    first = next((fault for fault in found if fault["type"] == "extra_forbidden"), found[0])
    path = [str(part) for part in first["loc"]]
    key, known = ".".join(path), _keys_at(model, path[:-1])
    if first["type"] == "extra_forbidden":
        hint = suggestion(path[-1], known) if known else f"{model.__name__} takes no parameters"
        return UsageError(f"{where}: unknown key '{key}'", hint=hint)
    if first["type"] == "missing":
        return UsageError(f"{where}: key '{key}' is missing", hint=f"add '{key}:' to the recipe")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "model_type" and not path:
        return UsageError(f"{where}: a recipe is a mapping of keys, got {type(first['input']).__name__}")
    if not path:
        return UsageError(f"{where}: {message}")
    # A union reports the branch that it tried as part of the path, which is not a key.
    key = ".".join(part for i, part in enumerate(path) if part in _keys_at(model, path[:i]))
    field = model.model_fields.get(path[0])
    described = f"{path[0]}: {field.description}" if field and field.description else None
    # A mapping is not repeated: the message names its key.
    got = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
    return UsageError(f"{where}: key '{key}': {message}{got}", hint=described)


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        if part.isdigit():  # the index of a list's element, whose kind is known already
            continue
        inner = model.model_fields[part].annotation if part in model.model_fields else None
        while get_args(inner) and get_origin(inner) is not dict:  # a list of models, or an optional one
            inner = get_args(inner)[0]
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)
