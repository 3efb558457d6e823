"""``upcycle list``: prints the methods, routers, routing rules, families, targets, losses and recipes to choose from."""

from __future__ import annotations

from typing import Any

import click

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import print_json, print_line, print_markdown, print_table
from upcycle.cli.shared.plugin_tables import LISTED_KINDS, entries, matrix, plugin_table
from upcycle.errors import UsageError
from upcycle.registry import DESCRIBED, OWN_TARGETS


@click.command("list", short_help="List methods, routers, targets and more")
@click.argument("kind", type=click.Choice(LISTED_KINDS), required=False)
@click.option("--markdown", "as_markdown", is_flag=True, help="print one of them as a Markdown table")
@common_options
def command(kind: str | None, as_markdown: bool, as_json: bool, debug: bool) -> None:
    """List the methods, routers, routing rules, families, targets, losses or recipes that there are, or all of these."""
    if as_markdown:
        if kind is None:
            raise UsageError("--markdown prints one table: say which", hint="upcycle list methods --markdown")
        print_markdown(plugin_table(kind))
        return
    listing = {name: entries(name) for name in ([kind] if kind else LISTED_KINDS)}
    if as_json:
        print_json(listing)
        return
    for name, found in listing.items():
        columns = list(found[0])
        rows = [[_text(entry[column]) for column in columns] for entry in found]
        print_table(columns, rows, title=f"{'' if kind else chr(10)}{name}")
        if name == "families":
            header, *lines = matrix()
            legend = ", ".join(f"{number} {target}" for number, target in enumerate(header[1:], start=1))
            print_table(["", *map(str, range(1, len(header)))], lines, title=f"\ntargets, 1 preferred: {legend}")
            wrapped = ", ".join(DESCRIBED)
            print_line()
            print_line(f"{next(iter(OWN_TARGETS))}, upcycle's own target, holds all of these, and {wrapped}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {text}" for name, text in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(value)
    return value or "-"
