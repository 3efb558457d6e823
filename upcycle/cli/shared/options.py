"""Click options that several verbs share. Those of a recipe are made from the recipe's fields, so that both always agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from upcycle.cli.shared.completion import plugin_names
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import parse_yaml
from upcycle.files.locate import is_local
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe, set_key
from upcycle.recipe.mergekit_recipe import is_mergekit, translate
from upcycle.recipe.precision_recipe import PrecisionRecipe
from upcycle.recipe.recipe_parts import (
    CalibrationRecipe,
    ReconstructionRecipe,
    RouterRecipe,
    RoutingRecipe,
    VerificationRecipe,
)
from upcycle.recipe.shipped_recipes import conversion_recipe, recipe_hint

F = TypeVar("F", bound=Callable[..., Any])

# Option -> recipe key. Help text, type and default of the option are those of the key's field.
_FLAGS = {
    ("--method", "-m"): "method",
    ("--experts", "-e"): "experts",
    ("--top-k", "-k"): "top_k",
    ("--shared",): "shared",
    ("--active",): "active",
    ("--pieces",): "pieces",
    ("--width",): "width",
    ("--always-on",): "always_on",
    ("--shared-unheld",): "shared_unheld",
    ("--keep",): "keep",
    ("--observations",): "observations",
    ("--bits",): "precision.bits",
    ("--attention-bits",): "precision.attention_bits",
    ("--rounding",): "precision.rounding",
    ("--allocation",): "precision.allocation",
    ("--layers",): "layers",
    ("--router",): "router.name",
    ("--routing",): "routing.rule",
    ("--tau",): "routing.tau",
    ("--calibration",): "calibration.text",
    ("--calibration-tokens",): "calibration.tokens",
    ("--calibration-mode",): "calibration.mode",
    ("--refit",): "refit",
    ("--refit-passes",): "reconstruction.passes",
    ("--scale",): "scale",
    ("--pad",): "pad",
    ("--family",): "family",
    ("--part",): "part",
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
_COMPLETED = {
    "method": "method",
    "router.name": "router",
    "target": "target",
}  # key -> the kind of plug-in that it names
# Parameters of single methods that have an option of their own; all others are given as --param NAME=VALUE.
_PARAMETERS = {
    "--scale-placement": (
        ("down", "up_down", "paper"),
        "where virtual_groups scales weights: down and up_down preserve the function; its paper trains with paper, after "
        "finding that down trains worse (upcycle convert upcycle_cpt)  [default: down]",
    ),
}
_INNER: dict[str, type[BaseModel]] = {
    "router": RouterRecipe,
    "routing": RoutingRecipe,
    "calibration": CalibrationRecipe,
    "reconstruction": ReconstructionRecipe,
    "precision": PrecisionRecipe,
    "verification": VerificationRecipe,
}


def _field(key: str) -> Any:
    outer, _, inner = key.partition(".")
    return _INNER[outer].model_fields[inner] if inner else Recipe.model_fields[key]


def recipe_options(function: F) -> F:
    """Add an option for every recipe key in ``_FLAGS``; the command receives them as ``**flags`` for :func:`build_recipe`."""
    router = "a parameter of the router initialiser (repeatable)"
    function = _repeatable(function)
    function = click.option("--router-param", "router_param", multiple=True, metavar="NAME=VALUE", help=router)(
        function
    )
    for flag, (values, text) in _PARAMETERS.items():
        function = click.option(flag, type=click.Choice(values), default=None, help=text)(function)
    return _options_of(function, [*_FLAGS.values()])


def some_recipe_options(*keys: str) -> Callable[[F], F]:
    """Return what adds the options of some recipe keys alone, for verbs that read no others."""
    return lambda function: _options_of(_repeatable(function), keys)


def _repeatable(function: F) -> F:
    """Add the options that set any key, any parameter of the method, or the source of a recipe."""
    texts = {
        ("--set", "set_"): ("KEY=VALUE", "set any recipe key, e.g. router.parameters.std=0.01 (repeatable)"),
        ("--param", "param"): ("NAME=VALUE", "a parameter of the method (repeatable)"),
    }
    for (flag, name), (metavar, text) in texts.items():
        function = click.option(flag, name, multiple=True, metavar=metavar, help=text)(function)
    return click.option(
        "--source", "source_flag", metavar="SOURCE", help="convert this model instead of the one in the recipe"
    )(function)


def _options_of(function: F, keys: Sequence[str]) -> F:
    for flags, key in reversed(_FLAGS.items()):
        if key not in keys:
            continue
        field = _field(key)
        choices = [choice for choice in get_args(field.annotation) if isinstance(choice, str)]
        text = field.description
        if not any(field.default is nothing for nothing in (None, False, PydanticUndefined)):
            text += f"  [default: {field.default}]"
        settings: dict[str, Any] = {"help": text, "default": None}
        if field.annotation is bool:
            settings["is_flag"] = True
        elif choices:
            settings["type"] = click.Choice(choices)
        elif field.annotation in (int, int | None, float, float | None):
            settings["type"] = int if field.annotation in (int, int | None) else float
        if key in _COMPLETED:
            settings["shell_complete"] = plugin_names(_COMPLETED[key])
        function = click.option(*flags, key.replace(".", "__"), **settings)(function)
    return function


def common_options(function: F) -> F:
    """Add the options that every verb has."""
    function = click.option("--debug", is_flag=True, help="show the traceback of an error")(function)
    return click.option("--json", "as_json", is_flag=True, help="print the result as JSON on stdout")(function)


def quiet_option(function: F) -> F:
    """Add ``--quiet``, for verbs that report progress."""
    return click.option("--quiet", "-q", is_flag=True, help="print no progress bars and no warnings")(function)


def card_options(function: F) -> F:
    """Add options for what a model card needs and only the user may know."""
    function = click.option(
        "--base-model", metavar="REPO", help="hub id of the dense model, if a local folder was converted"
    )(function)
    function = click.option("--license-link", metavar="URL", help="address of the text of an 'other' licence")(function)
    function = click.option("--license-name", metavar="NAME", help="name of an 'other' licence")(function)
    return click.option(
        "--license", metavar="ID", help="the hub's id of the licence, if it does not follow from the sources"
    )(function)


def build_recipe(
    source: str | None,
    flags: dict[str, Any],
    base: dict[str, Any] | None = None,
    notify: Callable[[str], None] | None = None,
) -> Recipe:
    """Return the recipe that a command line describes: defaults, overridden by a recipe file, overridden by options.

    Args:
        source: a model, the path of a ``.yaml`` recipe (of upcycle or of mergekit-moe), or the name of a recipe that comes with
            upcycle.
        flags: the options that :func:`recipe_options` added, by their Python names.
        base: recipe keys that a recipe file and options override.
        notify: called with each line that says how a mergekit-moe recipe was translated.

    Raises:
        UsageError: two different sources were named, or the result is not a valid recipe; the message names the key.
    """
    content: dict[str, Any] = dict(base or {})
    where, source_flag = "recipe", flags.get("source_flag")
    named_recipe = conversion_recipe(source) if source else None
    if named_recipe:
        where, found = named_recipe
        if is_mergekit(found):
            found, notes = translate(found, where)
            for note in notes if notify else []:
                notify(note)  # type: ignore[misc]
        content |= found
    elif source:
        _refuse_two(source, source_flag)
        if not is_local(source) and "/" not in source:  # a hub id has a slash
            raise UsageError(
                f"no such file or folder: {source}",
                hint="SOURCE is a local folder, a .gguf file, a hub id (org/name), demo, or a recipe: "
                + recipe_hint(source, "convert"),
            )
        content["source"] = source
    if source_flag:
        if content.get("source") not in (None, source_flag):
            content.pop("revision", None)  # it belongs to the source that is replaced
        content["source"] = source_flag
    named = source if source and not named_recipe else source_flag
    _override_by_flags(content, flags)
    if named:
        _refuse_two(named, content["source"], "--set source")
    if isinstance(content.get("scale"), str):
        content["scale"] = _number_if_possible(content["scale"])
    return parse_recipe(content, where)


def _refuse_two(one: str, other: str | None, flag: str = "--source") -> None:
    """Check that ``other``, which ``flag`` named, is the same source as ``one`` or None.

    Raises:
        UsageError: they are two different sources.
    """
    if other in (None, one):
        return
    raise UsageError(
        f"two sources: '{one}' and {flag} '{other}'",
        hint=f"name only one of them; if '{one}' was meant to be a recipe: {recipe_hint(one, 'convert')}",
    )


def _override_by_flags(content: dict[str, Any], flags: dict[str, Any]) -> None:
    """Write every option that was given over the recipe key that it stands for."""
    if flags.get("active") is not None:  # in the place of a recipe's numbers
        for key in ("experts", "top_k", "shared"):
            content.pop(key, None)
    for key in _FLAGS.values():
        value = flags.get(key.replace(".", "__"))
        if value is not None and value is not False:  # 0 is a value
            set_key(content, key, value)
    for flag in _PARAMETERS:
        name = flag.removeprefix("--").replace("-", "_")
        if flags.get(name) is not None:
            set_key(content, f"parameters.{name}", flags[name])
    for group, prefix in (("param", "parameters."), ("router_param", "router.parameters."), ("set_", "")):
        for assignment in flags.get(group, ()):
            name, equals, value = assignment.partition("=")
            if not equals or not name:
                flag = {"set_": "set", "router_param": "router-param"}.get(group, group)
                raise UsageError(f"--{flag} takes NAME=VALUE, got '{assignment}'")
            set_key(content, prefix + name, assigned(assignment, value))


def assigned(assignment: str, value: str) -> Any:
    """Return the value of ``NAME=VALUE``, read as YAML.

    Args:
        assignment: the whole ``NAME=VALUE``, for the message.
        value: the part behind the equals sign.

    Raises:
        UsageError: it is not YAML.
    """
    try:
        return parse_yaml(value, "it", error=UsageError)
    except UsageError as error:
        raise UsageError(
            f"cannot read the value in '{assignment}': {error.message}", hint="put quotes around it, as in YAML"
        ) from None


def _number_if_possible(value: str) -> str | float:
    try:
        return float(value)
    except ValueError:
        return value
