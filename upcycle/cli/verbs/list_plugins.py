"""``upcycle list``: what there is to choose from."""

from __future__ import annotations

from typing import Any

import click

from upcycle.cli.shared.options import common_options
from upcycle.cli.shared.output import print_json, print_markdown, print_table
from upcycle.errors import UsageError
from upcycle.recipe.shipped_recipes import VERBS, shipped, summary

KINDS = ("methods", "routers", "families", "targets", "losses", "recipes")


@click.command("list")
@click.argument("kind", type=click.Choice(KINDS), required=False)
@click.option("--markdown", "as_markdown", is_flag=True, help="families or targets as the README's table")
@common_options
def command(kind: str | None, as_markdown: bool, as_json: bool, debug: bool) -> None:
    """List methods, routers, families, targets, losses or recipes; all of them when KIND is left out."""
    if as_markdown:
        if kind not in ("families", "targets"):
            raise UsageError("--markdown prints families or targets", hint="upcycle list families --markdown")
        print_markdown(markdown(kind))
        return
    listing = {name: entries(name) for name in ([kind] if kind else KINDS)}
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


def matrix() -> list[list[str]]:
    """A header row with every target, then a row per family: 1 where it converts to its preferred target, 2 to the next..."""
    from upcycle.registry import FAMILIES, TARGETS, load

    ranks = {name: {target: str(i) for i, target in enumerate(load("family", name).targets, 1)} for name in FAMILIES}
    return [
        ["dense family", *TARGETS],
        *([name, *(ranks[name].get(target, "") for target in TARGETS)] for name in FAMILIES),
    ]


def markdown(kind: str) -> str:
    """The README's table of families (the matrix) or of targets."""
    if kind == "families":
        header, *rows = matrix()
        titles = [entry["title"] for entry in entries("families")]
        header = [header[0], "models", *(f"`{name}`" for name in header[1:])]
        rows = [[f"`{name}`", title, *ranks] for title, (name, *ranks) in zip(titles, rows, strict=True)]
    else:
        header = ["target", "model", "shared experts", "dense layers", "router", "attention and block it can hold"]
        rows = [_target_row(entry) for entry in entries("targets")]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _target_row(entry: dict[str, Any]) -> list[str]:
    from upcycle.architectures.dense.base import Feature

    aside = (Feature.SHARED_EXPERTS, Feature.DENSE_FIRST, Feature.DENSE_LAYERS)
    shared, first, between = (feature.value in entry["holds"] for feature in aside)
    block = [feature.value for feature in Feature if feature.value in entry["holds"] and feature not in aside]
    dense = "anywhere" if between else "first" if first else "no"
    return [f"`{entry['name']}`", entry["title"], "yes" if shared else "no", dense, entry["router"], "; ".join(block)]


def entries(kind: str) -> list[dict[str, Any]]:
    """One dictionary per plug-in, in registry order."""
    from upcycle.registry import KINDS as REGISTRY
    from upcycle.registry import load

    if kind == "recipes":
        return [
            {"name": name, "command": f"upcycle {verb} {name}", "what": summary(path), "path": str(path)}
            for verb in VERBS
            for name, path in shipped(verb).items()
        ]
    singular = {"families": "family", "losses": "loss"}.get(kind, kind[:-1])
    found = []
    for name in REGISTRY[singular]:
        plugin = load(singular, name)
        entry: dict[str, Any] = {"name": name, "title": plugin.title}
        if singular in ("method", "router", "loss"):
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


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {text}" for name, text in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(value)
    return value or "-"
