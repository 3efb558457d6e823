"""Everything in the registry as rows and Markdown tables, for ``upcycle list`` and the reference pages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from upcycle.recipe.model_recipes import model_recipes, table_file
from upcycle.recipe.shipped_recipes import RECIPE_VERBS, shipped, summary
from upcycle.registry import FAMILIES, TARGETS, load
from upcycle.registry import KINDS as REGISTRY

LISTED_KINDS = ("methods", "routers", "rules", "families", "targets", "wrappers", "losses", "recipes")
SINGULAR = {
    "methods": "method",
    "routers": "router",
    "rules": "rule",
    "families": "family",
    "targets": "target",
    "wrappers": "wrapper",
    "losses": "loss",
    "recipes": "recipe",
}


def plugins(kind: str) -> dict[str, Any]:
    """Return the plug-in classes of ``kind`` (a plural of :data:`LISTED_KINDS`) by name, in registry order."""
    if kind == "rules":
        from upcycle.models.own.routing.rules import RULES

        return dict(RULES)
    singular = SINGULAR[kind]
    found = {name: load(singular, name) for name in REGISTRY[singular]}
    # A model of parts whose MoE is a class of its own is registered under both names.
    return {name: plugin for name, plugin in found.items() if singular != "wrapper" or plugin.name == name}


def entries(kind: str) -> list[dict[str, Any]]:
    """Return one dictionary of plain data per plug-in, in registry order."""
    if kind == "recipes":
        general = [
            {"name": name, "command": f"upcycle {verb} {name}", "what": summary(path), "model": None, "path": str(path)}
            for verb in RECIPE_VERBS
            for name, path in shipped(verb).items()
        ]
        where = str(table_file())
        return general + [
            {
                "name": one.name,
                "command": f"upcycle convert {one.name}",
                "what": one.what,
                "model": one.model,
                "path": where,
            }
            for one in model_recipes().values()
        ]
    found = []
    for name, plugin in plugins(kind).items():
        entry: dict[str, Any] = {"name": name, "title": plugin.title}
        if kind in ("methods", "routers", "losses"):
            entry["parameters"] = {
                key: f"{field.description} [default: {field.default}]"
                for key, field in plugin.Parameters.model_fields.items()
            }
            entry["paper"] = plugin.paper
        elif kind == "rules":
            entry["parameters"] = {field.name: f"[default: {field.default}]" for field in fields(plugin)}
            entry["paper"] = plugin.paper
        elif kind == "families":
            entry["targets"] = list(plugin.targets)
        elif kind == "wrappers":
            entry["text models"] = list(plugin.text_models)
            entry["written as"] = plugin.result
        else:
            entry["router"] = plugin.router_semantics
            entry["holds"] = sorted(feature.value for feature in plugin.holds)
        found.append(entry)
    return found


def models_with_recipes() -> list[list[str]]:
    """Return a row for every model that has recipes of its own: its hub id, and their names."""
    found: dict[str, list[str]] = {}
    for one in model_recipes().values():
        found.setdefault(one.source, []).append(one.name)
    return [[source, ", ".join(names)] for source, names in found.items()]


def matrix() -> list[list[str]]:
    """Return a header row with every target, then a row per family: 1 where it converts to its preferred target, 2 to the next..."""
    ranks = {name: {target: str(i) for i, target in enumerate(load("family", name).targets, 1)} for name in FAMILIES}
    return [
        ["dense family", *TARGETS],
        *([name, *(ranks[name].get(target, "") for target in TARGETS)] for name in FAMILIES),
    ]


def plugin_table(kind: str) -> str:
    """Return all plug-ins of ``kind`` as one Markdown table, a row each."""
    if kind == "families":
        header, *ranks = matrix()
        titles = [entry["title"] for entry in entries(kind)]
        rows = [[f"`{name}`", title, *numbers] for title, (name, *numbers) in zip(titles, ranks, strict=True)]
        return markdown_table([header[0], "models", *(f"`{name}`" for name in header[1:])], rows)
    if kind == "targets":
        rows = [_target_row(entry) for entry in entries(kind)]
        return markdown_table(
            ["target", "model", "shared experts", "dense layers", "router", "attention and block it can hold"], rows
        )
    if kind == "wrappers":
        header = ["model of parts", "models", "text models", "written as"]
        rows = [
            [f"`{each['name']}`", each["title"], ", ".join(each["text models"]), f"`{each['written as']}`"]
            for each in entries(kind)
        ]
        return markdown_table(header, rows)
    if kind == "recipes":
        general = [[f"`{each['command']}`", each["what"]] for each in entries(kind) if each["model"] is None]
        by_model = markdown_table(["model", "recipes"], models_with_recipes())
        return f"{markdown_table(['command', 'what it does'], general)}\n\n{by_model}"
    return markdown_table(
        ["name", "what it is", "paper"],
        [[f"`{name}`", in_one_line(plugin), papers(plugin)] for name, plugin in plugins(kind).items()],
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; what would end a cell is escaped, line ends become spaces."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.split()).replace("|", r"\|") for c in line) + " |" for line in lines)


def in_one_line(plugin: Any) -> str:
    """Return the first sentence of the docstring of the plug-in's module, without its full stop."""
    text = (sys.modules[plugin.__module__].__doc__ or "").split("\n\n")[0]
    return " ".join(text.split()).split(". ")[0].replace("``", "`").removesuffix(".")


def papers(plugin: Any) -> str:
    """Return a plug-in's papers as Markdown links, or nothing."""
    return ", ".join(f"[{each.rsplit('/', 1)[-1]}]({each})" for each in (plugin.paper or "").split(", ") if each)


def _target_row(entry: dict[str, Any]) -> list[str]:
    from upcycle.architectures.dense.base import Feature

    aside = (Feature.SHARED_EXPERTS, Feature.DENSE_FIRST, Feature.DENSE_LAYERS)
    shared, first, between = (feature.value in entry["holds"] for feature in aside)
    block = [feature.value for feature in Feature if feature.value in entry["holds"] and feature not in aside]
    dense = "anywhere" if between else "first" if first else "no"
    return [f"`{entry['name']}`", entry["title"], "yes" if shared else "no", dense, entry["router"], "; ".join(block)]
