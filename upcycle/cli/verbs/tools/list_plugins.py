"""``upcycle list``: prints the methods, routers, routing rules, families, targets, losses and recipes to choose from."""

from __future__ import annotations

from typing import Any

import click

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import print_facts, print_json, print_line, print_markdown, print_table
from upcycle.cli.shared.plugin_tables import (
    LISTED_KINDS,
    SINGULAR,
    entries,
    in_one_line,
    matrix,
    models_with_recipes,
    plugin_table,
    plugins,
)
from upcycle.errors import UsageError
from upcycle.registry import DESCRIBED, OWN_TARGETS, suggestion

ONE_LINE = ("methods", "routers", "rules", "losses")  # whose modules begin with what they are


@click.command("list", short_help="List methods, routers, targets and more")
@click.argument("kind", type=click.Choice(LISTED_KINDS), required=False)
@click.argument("name", required=False)
@click.option("--markdown", "as_markdown", is_flag=True, help="print one of them as a Markdown table")
@common_options
def command(kind: str | None, name: str | None, as_markdown: bool, as_json: bool, debug: bool) -> None:
    """List the methods, routers, routing rules, families, targets, losses or recipes that there are, or all; or show one NAME.

    \b
    upcycle list
    upcycle list methods
    upcycle list methods drop_upcycling
    """
    if as_markdown:
        if kind is None or name:
            raise UsageError("--markdown prints one table: say which", hint="upcycle list methods --markdown")
        print_markdown(plugin_table(kind))
        return
    if kind and name:
        _show(kind, name, as_json)
        return
    listing = {each: entries(each) for each in ([kind] if kind else LISTED_KINDS)}
    if as_json:
        print_json(listing)
        return
    for each, found in listing.items():
        general = [entry for entry in found if not entry.get("model")]
        _print_listed(each, general, title=f"{'' if kind else chr(10)}{each}")
        if each == "recipes":
            print_table(["model", "its recipes"], models_with_recipes(), title="\nfor models that many people have")
            print_line()
            print_line(f"upcycle convert {found[-1]['name']} OUT; --source converts another model of the same shape")
        if each == "families":
            header, *lines = matrix()
            legend = ", ".join(f"{number} {target}" for number, target in enumerate(header[1:], start=1))
            print_table(["", *map(str, range(1, len(header)))], lines, title=f"\ntargets, 1 preferred: {legend}")
            wrapped = ", ".join(DESCRIBED)
            print_line()
            print_line(f"{next(iter(OWN_TARGETS))}, upcycle's own target, holds all of these, and {wrapped}")
    if kind in ONE_LINE:
        print_line()
        print_line(f"parameters and paper of one: upcycle list {kind} {listing[kind][0]['name']}")


def _print_listed(kind: str, found: list[dict[str, Any]], title: str) -> None:
    """Print one line for each, as far as the terminal allows: its name, and what it is."""
    what = {name: in_one_line(plugin) for name, plugin in plugins(kind).items()} if kind in ONE_LINE else {}
    columns = (
        ["name", "what it is"]
        if what
        else [column for column in found[0] if column not in ("path", "parameters", "model")]
    )
    rows = [
        [what[entry["name"]] if column == "what it is" else _text(entry[column]) for column in columns]
        for entry in found
    ]
    print_table(columns, rows, title=title)


def _show(kind: str, name: str, as_json: bool) -> None:
    """Print all that is known of one of a kind.

    Raises:
        UsageError: there is none of that name.
    """
    found = {entry["name"]: entry for entry in entries(kind)}
    if name not in found:
        raise UsageError(f"no such {SINGULAR[kind]}: {name}", hint=suggestion(name, found))
    entry = found[name]
    if as_json:
        print_json(entry)
        return
    parameters = entry.pop("parameters", None)
    if kind in ONE_LINE:
        entry = {"name": name, "what it is": in_one_line(plugins(kind)[name]), **entry}
    print_facts((key, _text(value)) for key, value in entry.items())
    if parameters is not None:
        print_table(
            ["parameter", "meaning"], [[key, text] for key, text in parameters.items()], title="\n" + "parameters"
        )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return value or "-"
