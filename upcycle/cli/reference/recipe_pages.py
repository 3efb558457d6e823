"""Pages of recipe keys, made from the pydantic models that validate them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from upcycle.cli.reference.docstrings import inline
from upcycle.cli.shared.plugin_tables import markdown_table


def conversion_recipe_page() -> str:
    """Return the page of all keys of a conversion recipe."""
    from upcycle.recipe.conversion_recipe import Recipe

    return "\n\n".join(
        [
            "# Conversion recipe",
            "A YAML file with these keys, given in place of the source: `upcycle convert recipe.yaml OUT`. Every key is also a flag "
            "of [`upcycle convert`](commands.md) and a keyword argument of [`upcycle.convert`](python.md), and `--set KEY=VALUE` lays "
            "a value over any of them, such as `router.parameters.std=0.01`. Unknown keys are errors. The resolved recipe is written "
            "into the output folder.",
            *_model_sections(Recipe),
        ]
    )


def training_recipe_page() -> str:
    """Return the page of all keys of a training recipe."""
    from upcycle.trainers.recipe.training_recipe import TrainRecipe

    return "\n\n".join(
        [
            "# Training recipe",
            "A YAML file with these keys, for `upcycle train RECIPE`. `--set KEY=VALUE` lays a value over any of them, such as "
            "`zero.stage=2` or `stages.heal.tokens=5000000`. Unknown keys are errors. The [guide](../guides/training.md) shows "
            "recipes that are complete.",
            *_model_sections(TrainRecipe),
        ]
    )


def rounds_recipe_page() -> str:
    """Return the page of all keys of a recipe of rounds."""
    from upcycle.branching.rounds_recipe import RoundsRecipe

    return "\n\n".join(
        [
            "# Recipe of rounds",
            "A YAML file with these keys, for [`upcycle grow RECIPE`](../guides/mixing.md#branch-train-merge-and-again). "
            "`--set KEY=VALUE` lays a value over any of them, such as `domains.law=law.jsonl` or `training.stages.steps=500`. "
            "Unknown keys are errors.",
            *_model_sections(RoundsRecipe),
        ]
    )


def fields_table(fields: Mapping[str, FieldInfo], what: str = "key") -> str:
    """Return the table of a model's fields: name, meaning, default."""
    return markdown_table(
        [what, "meaning", "default"],
        [
            [f"`{name}`", inline(field.description or "") + _choices(field), _default(field)]
            for name, field in fields.items()
        ],
    )


def _model_sections(model: type[BaseModel]) -> Iterator[str]:
    """Yield the table of a model, then one for every model within it, once each, under the path of its first use."""
    waiting, seen = [("", model)], {model}
    while waiting:
        path, current = waiting.pop(0)
        if path:
            yield f"## {path}"
            yield inline((current.__doc__ or "").split("\n\n")[0].strip())
        yield fields_table(current.model_fields)
        for name, field in current.model_fields.items():
            for inner, marks in _models_in(field.annotation):
                if inner not in seen:
                    seen.add(inner)
                    waiting.append((f"{path}.{name}{marks}".lstrip("."), inner))


def _models_in(annotation: Any) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield the models that a value may be, with ``[]`` behind the name where it is one of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, ""
    marks = "[]" if get_origin(annotation) in (list, tuple) else ""
    for inner in get_args(annotation):
        for model, more in _models_in(inner):
            yield model, marks + more


def _choices(field: FieldInfo) -> str:
    """Return the words that a field takes, where its description does not name them all."""
    words = [word for word in _literals(field.annotation) if isinstance(word, str)]
    described = field.description or ""
    return "" if all(word in described for word in words) else f" ({', '.join(f'`{word}`' for word in words)})"


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) is not dict:
        for inner in get_args(annotation):
            yield from _literals(inner)


def _default(field: FieldInfo) -> str:
    """Return a field's default as YAML would have it; nothing for none, and for a model of its own, whose keys have theirs."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel) or value in ([], {}, ()):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}`"
