"""Click options shared by verbs. Those of a recipe are made from the recipe's own fields, so they cannot disagree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from upcycle.errors import UsageError
from upcycle.files.formats.parsing import parse_yaml
from upcycle.files.locate import is_local
from upcycle.recipe.conversion_recipe import (
    CalibrationRecipe,
    Recipe,
    RouterRecipe,
    VerificationRecipe,
    parse_recipe,
    read_recipe,
    set_key,
)
from upcycle.recipe.mergekit_recipe import is_mergekit, translate
from upcycle.recipe.shipped_recipes import recipe_file, recipe_hint

F = TypeVar("F", bound=Callable[..., Any])

# flag -> recipe key; the flag's help, type and default come from the key.
_FLAGS = {
    ("--method", "-m"): "method",
    ("--experts", "-e"): "experts",
    ("--top-k", "-k"): "top_k",
    ("--shared",): "shared",
    ("--active",): "active",
    ("--pieces",): "pieces",
    ("--shared-unheld",): "shared_unheld",
    ("--layers",): "layers",
    ("--router",): "router.name",
    ("--calibration",): "calibration.text",
    ("--calibration-tokens",): "calibration.tokens",
    ("--calibration-mode",): "calibration.mode",
    ("--refit",): "refit",
    ("--scale",): "scale",
    ("--pad",): "pad",
    ("--target",): "target",
    ("--layout",): "layout",
    ("--dtype",): "dtype",
    ("--max-shard-size",): "max_shard_size",
    ("--tokenizer",): "tokenizer",
    ("--seed",): "seed",
    ("--revision",): "revision",
    ("--sources",): "sources",
    ("--verify-text",): "verification.text",
    ("--verify-tokens",): "verification.tokens",
}
# Parameters of one method that have a flag; all others are --param NAME=VALUE.
_PARAMETERS = {
    "--scale-placement": (
        ("down", "up_down", "paper"),
        "where virtual_groups puts its weight scale: down and up_down keep the function, its paper trains with paper, and "
        "found down worse (upcycle convert upcycle_cpt)  [default: down]",
    ),
}
_INNER: dict[str, type[BaseModel]] = {
    "router": RouterRecipe,
    "calibration": CalibrationRecipe,
    "verification": VerificationRecipe,
}


def _field(key: str) -> Any:
    outer, _, inner = key.partition(".")
    return _INNER[outer].model_fields[inner] if inner else Recipe.model_fields[key]


def recipe_options(function: F) -> F:
    """Add every recipe flag to a command; the command gets them as ``**flags``."""
    repeatable = [
        ("--set", "set_", "KEY=VALUE", "set any recipe key, e.g. router.parameters.std=0.01 (repeatable)"),
        ("--router-param", "router_param", "NAME=VALUE", "a parameter of the router initialiser (repeatable)"),
        ("--param", "param", "NAME=VALUE", "a parameter of the method (repeatable)"),
    ]
    for flag, name, metavar, text in repeatable:
        function = click.option(flag, name, multiple=True, metavar=metavar, help=text)(function)
    function = click.option(
        "--source", "source_flag", metavar="SOURCE", help="the source of a recipe, instead of its own"
    )(function)
    for flag, (values, text) in _PARAMETERS.items():
        function = click.option(flag, type=click.Choice(values), default=None, help=text)(function)
    for flags, key in reversed(_FLAGS.items()):
        field = _field(key)
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        text = field.description
        if field.default not in (None, False, PydanticUndefined):
            text += f"  [default: {field.default}]"
        settings: dict[str, Any] = {"help": text, "default": None}
        if field.annotation is bool:
            settings["is_flag"] = True
        elif choices:
            settings["type"] = click.Choice(choices)
        elif field.annotation in (int, float | None):
            settings["type"] = int if field.annotation is int else float
        function = click.option(*flags, key.replace(".", "__"), **settings)(function)
    return function


def common_options(function: F) -> F:
    """Options every verb has."""
    function = click.option("--debug", is_flag=True, help="show the traceback of an error")(function)
    return click.option("--json", "as_json", is_flag=True, help="print the result as JSON on stdout")(function)


def quiet_option(function: F) -> F:
    """For verbs that report progress."""
    return click.option("--quiet", "-q", is_flag=True, help="no progress bars and no warnings")(function)


def card_options(function: F) -> F:
    """What only the user knows of a model card."""
    function = click.option(
        "--base-model", metavar="REPO", help="hub id of the dense model, if a folder was converted"
    )(function)
    function = click.option("--license-link", metavar="URL", help="where an 'other' licence stands")(function)
    function = click.option("--license-name", metavar="NAME", help="what an 'other' licence is called")(function)
    return click.option("--license", metavar="ID", help="the hub's name of the licence, if the sources' do not decide")(
        function
    )


def build_recipe(
    source: str | None,
    flags: dict[str, Any],
    base: dict[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> Recipe:
    """Default < recipe file < flags. ``source`` is a source, the path of a ``.yaml`` recipe, ours or mergekit-moe's, or the name of
    a recipe that comes with upcycle; ``say`` is told what mergekit's maps to.

    Raises:
        UsageError: two sources disagree, or the result is not a valid recipe; the message names the key.
    """
    content: dict[str, Any] = dict(base or {})
    where, told = "recipe", flags["source_flag"]
    path = recipe_file(source, "convert") if source else None
    if path:
        found = read_recipe(path)
        if is_mergekit(found):
            found, notes = translate(found, str(path))
            for note in notes if say else []:
                say(note)  # type: ignore[misc]
        content |= found
        where = str(path)
    elif source:
        _refuse_two(source, told)
        if not is_local(source) and "/" not in source:  # no hub id either
            raise UsageError(
                f"no such file or folder: {source}",
                hint="a source is a local folder, a .gguf file, a hub id (org/name), demo, or a recipe: "
                + recipe_hint(source, "convert"),
            )
        content["source"] = source
    if told:
        if content.get("source") not in (None, told):
            content.pop("revision", None)  # it is of the recipe's own source
        content["source"] = told
    named = source if source and not path else told
    _lay_flags(content, flags)
    if named:
        _refuse_two(named, content["source"], "--set source")
    if isinstance(content.get("scale"), str):
        content["scale"] = _number_if_possible(content["scale"])
    return parse_recipe(content, where)


def _refuse_two(one: str, other: str | None, flag: str = "--source") -> None:
    """
    Raises:
        UsageError: two sources that disagree.
    """
    if other in (None, one):
        return
    raise UsageError(
        f"two sources: '{one}' and {flag} '{other}'",
        hint=f"leave one out; where '{one}' was to be a recipe, {recipe_hint(one, 'convert')}",
    )


def _lay_flags(content: dict[str, Any], flags: dict[str, Any]) -> None:
    """Flags over what ``content`` says."""
    for key in _FLAGS.values():
        value = flags[key.replace(".", "__")]
        if value not in (None, False):
            set_key(content, key, value)
    for flag in _PARAMETERS:
        name = flag.removeprefix("--").replace("-", "_")
        if flags.get(name) is not None:
            set_key(content, f"parameters.{name}", flags[name])
    for group, prefix in (("param", "parameters."), ("router_param", "router.parameters."), ("set_", "")):
        for assignment in flags[group]:
            name, equals, value = assignment.partition("=")
            if not equals or not name:
                flag = {"set_": "set", "router_param": "router-param"}.get(group, group)
                raise UsageError(f"--{flag} takes NAME=VALUE, got '{assignment}'")
            set_key(content, prefix + name, assigned(assignment, value))


def assigned(assignment: str, value: str) -> Any:
    """The value of ``NAME=VALUE``, read as YAML.

    Raises:
        UsageError: it is no YAML.
    """
    try:
        return parse_yaml(value, "it", error=UsageError)
    except UsageError as error:
        raise UsageError(
            f"cannot read the value in '{assignment}': {error.message}", hint="quote it as YAML would"
        ) from None


def _number_if_possible(value: str) -> str | float:
    try:
        return float(value)
    except ValueError:
        return value
