"""The typed keywords of upcycle.convert and plan are the recipe's keys, with its types and all their short forms."""

from __future__ import annotations

import inspect
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import upcycle
from upcycle.recipe import recipe_keywords
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe

SHORT_FORMS = {  # an example of every form of a key that is not the mapping of its own keys
    "sources": ["./a,./b", ["./a", {"name": "./b", "weight": 2.0}]],
    "router": ["random"],
    "routing": ["top_k"],
    "calibration": ["demo", ["demo", "self"]],
    "precision": ["4", 4],
    "projections": [4],
}


def keys_of(model: type[BaseModel]) -> type:
    found = getattr(recipe_keywords, model.__name__.removesuffix("Recipe") + "Keys")
    assert is_typeddict(found)
    return found  # type: ignore[no-any-return]


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model that a key holds, or a list of which it holds."""
    if get_origin(annotation) is list:
        (annotation,) = get_args(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def forms(annotation: Any) -> set[Any]:
    return set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}


@pytest.mark.parametrize(
    "model",
    [Recipe, *dict.fromkeys(m for f in Recipe.model_fields.values() if (m := inner_model(f.annotation)))],
    ids=lambda m: m.__name__,
)
def test_keywords_are_the_keys_with_their_types(model: type[BaseModel]) -> None:
    keys = recipe_keywords.RecipeKeys if model is Recipe else keys_of(model)
    hints = get_type_hints(keys)
    assert list(hints) == [name for name in model.model_fields if (model, name) != (Recipe, "source")]
    for name, hint in hints.items():
        annotation = model.model_fields[name].annotation
        inner = inner_model(annotation)
        if inner is None:
            assert hint == annotation, name
        elif name == "sources":
            assert hint == str | list[str | keys_of(inner)]  # type: ignore[misc]
        else:
            short = {list[str] if isinstance(one, list) else type(one) for one in SHORT_FORMS.get(name, [])}
            assert forms(hint) == {keys_of(inner), *short}, name


def test_short_forms_are_taken_and_there_are_no_others() -> None:
    for name, examples in SHORT_FORMS.items():
        for example in examples:
            parse_recipe({"source": "demo", name: example}, "it")
    for name, field in Recipe.model_fields.items():
        if inner_model(field.annotation) is None:
            continue
        taken = {type(one) for one in SHORT_FORMS.get(name, [])}
        for example in ("4", 4, ["demo"]):
            if type(example) not in taken:
                with pytest.raises(upcycle.errors.UsageError):
                    parse_recipe({"source": "demo", name: example}, "it")


def test_functions_take_these_keywords() -> None:
    for function in (upcycle.convert, upcycle.plan):
        (keys,) = (each for each in inspect.signature(function).parameters.values() if each.kind is each.VAR_KEYWORD)
        assert keys.annotation == "Unpack[RecipeKeys]"
        assert not set(inspect.signature(function).parameters) & set(recipe_keywords.RecipeKeys.__annotations__)
    assert Recipe.model_fields["source"].default is PydanticUndefined  # which is an argument of its own
