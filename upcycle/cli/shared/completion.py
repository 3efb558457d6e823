"""Names that a shell completes: of recipes, methods, routers, targets and families."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

from upcycle.recipe.shipped_recipes import RECIPE_VERBS, Verb, names_of_recipes
from upcycle.registry import KINDS

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
FILES = "file"  # what click's scripts take as: complete as the shell completes files


def _of(names: Callable[[], Iterable[str]], files: bool = False) -> Completer:
    def complete(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
        found = [CompletionItem(name) for name in sorted(set(names())) if name.startswith(begun)]
        # First, as bash's script then drops what came before it; with names behind it, they are offered, and files without.
        return [CompletionItem(begun, type=FILES), *found] if files else found

    return complete


def plugin_names(kind: str) -> Completer:
    """Complete the names of a kind of plug-in (a key of :data:`upcycle.registry.KINDS`)."""
    return _of(lambda: KINDS[kind])


def recipe_names(*verbs: Verb, files: bool = False) -> Completer:
    """Complete the recipes for some verbs (default: all), and files where there is no such recipe."""
    return _of(lambda: (name for verb in verbs or RECIPE_VERBS for name in names_of_recipes(verb)), files)
