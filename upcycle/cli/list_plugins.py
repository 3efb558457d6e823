"""``upcycle list``: what there is to choose from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from upcycle.cli.options import common_options
from upcycle.cli.output import print_json, print_table

RECIPES = Path(__file__).parent.parent / "configs" / "convert"
KINDS = ("methods", "routers", "families", "targets", "recipes")


@click.command("list")
@click.argument("kind", type=click.Choice(KINDS), required=False)
@common_options
def command(kind: str | None, as_json: bool, debug: bool) -> None:
    """List methods, routers, families, targets or recipes; all of them when KIND is left out."""
    listing = {name: entries(name) for name in ([kind] if kind else KINDS)}
    if as_json:
        print_json(listing)
        return
    for name, found in listing.items():
        columns = list(found[0])
        rows = [[escape(_text(entry[column])) for column in columns] for entry in found]
        print_table(columns, rows, title=f"{'' if kind else chr(10)}{name}")


def entries(kind: str) -> list[dict[str, Any]]:
    """One dictionary per plug-in, in registry order."""
    from upcycle.registry import KINDS as REGISTRY
    from upcycle.registry import load

    if kind == "recipes":
        return [
            {"name": path.stem, "what": _first_comment(path), "path": str(path)}
            for path in sorted(RECIPES.glob("*.yaml"))
        ]
    singular = {"families": "family"}.get(kind, kind[:-1])
    found = []
    for name in REGISTRY[singular]:
        plugin = load(singular, name)
        entry: dict[str, Any] = {"name": name, "title": plugin.title}
        if singular in ("method", "router"):
            entry["parameters"] = {
                key: f"{field.description} [default: {field.default}]"
                for key, field in plugin.Parameters.model_fields.items()
            }
            entry["paper"] = plugin.paper
        elif singular == "family":
            entry["targets"] = list(plugin.targets)
        else:
            entry["router"] = plugin.router_semantics
            entry["holds"] = sorted(feature.value for feature in plugin.holds)
        found.append(entry)
    return found


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {text}" for name, text in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(value)
    return value or "-"
