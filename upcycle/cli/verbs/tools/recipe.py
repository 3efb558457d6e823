"""``upcycle recipe``: prints a recipe that comes with upcycle, to change it."""

from __future__ import annotations

import click

from upcycle.cli.shared.completion import recipe_names
from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import print_json, print_markdown
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import parse_yaml
from upcycle.recipe.model_recipes import model_recipes
from upcycle.recipe.shipped_recipes import RECIPE_VERBS, names_of_recipes, shipped
from upcycle.registry import did_you_mean


@click.command("recipe", short_help="Print a recipe that comes with upcycle")
@click.argument("name", shell_complete=recipe_names())
@click.option(
    "--for", "verb", type=click.Choice(RECIPE_VERBS), help="the verb that takes it, where both have one of this name"
)
@common_options
def command(name: str, verb: str | None, as_json: bool, debug: bool) -> None:
    """Print the recipe NAME with its comments, so that you can change it.

    upcycle list recipes names them all. With --json, its keys and values are printed.

    \b
    upcycle recipe split_50 > mine.yaml
    upcycle convert mine.yaml OUT --source ./llama
    upcycle recipe qwen3-0.6b-split50
    upcycle recipe cumo --for train > stages.yaml
    """
    verbs = [each for each in RECIPE_VERBS if verb in (None, each)]
    found = {each: shipped(each)[name].read_text(encoding="utf-8") for each in verbs if name in shipped(each)}
    if "convert" in verbs and name in model_recipes():
        found["convert"] = model_recipes()[name].text
    if not found:
        known = [name for verb in verbs for name in names_of_recipes(verb)]
        hint = f"{did_you_mean(name, known)}upcycle list recipes names them all"
        raise UsageError(f"no such recipe: {name}", hint=hint)
    if len(found) > 1:
        commands = " or ".join(f"upcycle recipe {name} --for {each}" for each in found)
        raise UsageError(f"there are {len(found)} recipes '{name}', for {' and '.join(found)}", hint=commands)
    text = next(iter(found.values()))
    if as_json:
        print_json(parse_yaml(text, name, error=UsageError))
        return
    print_markdown(text.rstrip("\n"))
