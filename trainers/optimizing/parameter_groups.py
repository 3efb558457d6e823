"""Which parameters train in a stage, and with which learning rates: those of routers, of experts, and the rest."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from upcycle.adapters.live import adapter_of, parameter_of
from upcycle.errors import UsageError
from upcycle.trainers.distributed.gathering import shape_of
from upcycle.trainers.recipe.part_recipes import GroupParameters
from upcycle.trainers.routing.all_parts import PART_NAMES, part_name, reads_images
from upcycle.trainers.routing.stock_routers import find_routers, moe_layers, read_by_text, selection_bias

ParameterPart = Literal["router", "experts", "rest"]
PARTS: tuple[ParameterPart, ...] = ("router", "experts", "rest")


def parts(model: nn.Module) -> dict[str, ParameterPart]:
    """The part that each parameter of a model belongs to, by name; in a dense model all are ``rest``.

    A matrix of an adapter belongs to the part of the weight that it is added to.

    Shared experts and a shared expert's gate are ``rest``: they are always active, as attention is.
    """
    found: dict[str, ParameterPart] = {name: "rest" for name, _ in model.named_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for layer in moe_layers(model) or find_routers(model):
        for parameter in layer.router.parameters():
            found[names[id(parameter)]] = "router"
        for parameter in layer.experts.parameters():
            found[names[id(parameter)]] = "experts"
    for name in found:
        if (weight := parameter_of(name)) is not None:
            found[name] = found[weight]
    return found


def other_parts(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of a model of parts outside its text model and head; none of any other model."""
    paths = read_by_text(model)
    if paths is None:
        return []
    return [(name, parameter) for name, parameter in model.named_parameters() if not paths.has(name)]


def frozen_parts(model: nn.Module) -> str | None:
    """A sentence on what :func:`other_parts` are; ``None``: there are none."""
    others = other_parts(model)
    if not others:
        return None
    count = sum(math.prod(shape_of(weight)) for _, weight in others)
    listed = ", ".join(sorted({name.removeprefix("model.").partition(".")[0] for name, _ in others}))
    return f"the data are text: the text model trains, and {listed} ({count:,} parameters) stay as they are"


def select(model: nn.Module, trained: Sequence[str]) -> dict[str, ParameterPart]:
    """Make exactly the parameters that ``trained`` names require gradients; returns their names and parts.

    Args:
        model: a stock model; its biases on the choice of experts are never trained, nor are, in a model of parts, those that
            read no text. Where it has an adapter, nothing else trains.
        trained: any of ``all``, ``router``, ``experts``, ``rest``, where data have images ``language``, ``vision`` and ``connector``,
            two of both kinds with a dot (``vision.experts``), and patterns of parameter names with ``*``.

    Raises:
        UsageError: a word matches no parameter.
    """
    belongs = parts(model)
    biases = _selection_biases(model)
    outside = {name for name, _ in other_parts(model)}
    named = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in biases and name not in outside
    }
    if (held := adapter_of(model)) is not None:
        named = {name: named[name] for name in held.names}
    words: dict[str, set[str]] = {name: {"all", belongs[name]} for name in named}
    if reads_images(model):
        for name, some in words.items():
            part = part_name(model, name)
            some |= {part, f"{part}.{belongs[name]}"}
    chosen: set[str] = set()
    for word in trained:
        matching = {name for name in named if word in words[name] or fnmatchcase(name, word)}
        if not matching:
            examples = ", ".join(sorted(named)[:3])
            known = ", ".join((*PARTS, *(PART_NAMES if reads_images(model) else ())))
            raise UsageError(
                f"train: '{word}' matches no parameter",
                hint=f"use all, {known}, or a pattern with * of names such as {examples}",
            )
        chosen |= matching
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return {name: belongs[name] for name in named if name in chosen}


def groups(model: nn.Module, parameters: GroupParameters) -> list[dict[str, Any]]:
    """Optimizer groups of the parameters that require gradients, each with ``name``, ``params``, ``lr`` and ``weight_decay``.

    Each part of the model has a group of matrices and one of vectors, which have no weight decay. Groups are in a fixed order,
    and parameters in the model's.

    Raises:
        UsageError: no parameter requires gradients.
    """
    belongs = parts(model)
    members: dict[tuple[ParameterPart, bool], list[torch.Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[belongs[name], len(shape_of(parameter)) > 1].append(parameter)
    made = []
    for part in PARTS:
        for matrices in (True, False):
            if held := members.get((part, matrices)):
                made.append(
                    {
                        "name": part if matrices else f"{part} vectors",
                        "params": held,
                        "lr": parameters.learning_rate * getattr(parameters, part),
                        "weight_decay": _decay(parameters, part) if matrices else 0.0,
                    }
                )
    if not made:
        raise UsageError(
            "nothing trains: no parameter requires gradients", hint="set train to what trains: all, router, experts..."
        )
    return made


def _decay(parameters: GroupParameters, part: ParameterPart) -> float:
    of_routers = parameters.router_weight_decay
    return of_routers if part == "router" and of_routers is not None else parameters.weight_decay


def _selection_biases(model: nn.Module) -> set[int]:
    return {id(selection_bias(layer.block, layer.router)) for layer in moe_layers(model)}
