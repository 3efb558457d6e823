"""Pages of everything in the registry: a table, then a section for each, with what it does and its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.cli.reference.docstrings import as_markdown
from upcycle.cli.reference.recipe_pages import fields_table
from upcycle.cli.shared.plugin_tables import papers, plugin_table, plugins
from upcycle.registry import KINDS as REGISTRY

_INTRODUCTIONS = {
    "methods": "Methods decide what the experts are made of: `--method NAME`, with `--param KEY=VALUE` for its own parameters.",
    "routers": "Routers decide the first weights of the router: `--router NAME`, with `--router-param KEY=VALUE` for its own "
    "parameters.",
    "losses": "Auxiliary losses of training, per layer and over all tokens of the global batch "
    "([what that costs, and what capacity means](../guides/training_losses.md)). A stage of a training recipe names them: "
    "`losses: {switch_balance: {coefficient: 0.01}}`.",
    "families": "Dense families and the MoE architectures that hold them exactly. 1 is the first choice of `--target auto`, 2 the "
    "next; a target is taken if it holds what the model and the recipe ask for. Other families are refused with the reason.",
    "wrappers": "Models of parts of transformers: a text model beside encoders of images or sounds. The text model is converted, "
    "as a model of its family would be alone, with the same targets; the other parts are copied.",
    "targets": "MoE architectures of transformers that upcycle writes: `--target NAME`. `--target auto` takes the first of the "
    "family's targets that holds what the recipe asks for.",
}


def plugin_page(kind: str) -> str:
    """Return the page of all plug-ins of ``kind`` (a plural, such as ``methods``)."""
    parts = [f"# {kind.capitalize()}", _INTRODUCTIONS[kind], plugin_table(kind)]
    if kind != "wrappers":  # of which the table says all
        parts += [_section(kind, name, plugin) for name, plugin in plugins(kind).items()]
    return "\n\n".join(parts)


def source_file(kind: str, name: str) -> str:
    """Return the path, in the repository, of the module that a plug-in is in."""
    singular = {"families": "family", "losses": "loss"}.get(kind, kind[:-1])
    module = REGISTRY[singular][name].partition(":")[0]
    path = module.replace(".", "/") + ".py"
    outside = ("upcycle/splitters/", "upcycle/trainers/", "upcycle/kernels/")
    return path.removeprefix("upcycle/") if path.startswith(outside) else path


def _section(kind: str, name: str, plugin: Any) -> str:
    facts = [plugin.title, f"`{source_file(kind, name)}`"]
    if kind in ("methods", "routers", "losses") and plugin.paper:
        facts.insert(1, papers(plugin))
    parts = [f"## {name}", " · ".join(facts), as_markdown(plugin.__doc__)]
    parameters: Mapping[str, Any] = getattr(getattr(plugin, "Parameters", None), "model_fields", {})
    if parameters:
        parts.append(fields_table(parameters, "parameter"))
    return "\n\n".join(parts)
