"""Finds the parameters of a stock model that an adapter's pairs are added to, and gives the model these pairs."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from upcycle.adapters.live import ADAPTER, LowRankPair, attach
from upcycle.architectures.module_paths import module_paths_of
from upcycle.errors import UsageError
from upcycle.ffn.random_weights import stream
from upcycle.trainers.recipe.adapter_recipe import AdapterRecipe
from upcycle.trainers.routing.stock_routers import find_routers, moe_layers

Kind = Literal["attention", "ffn", "shared", "routed", "router"]
_PAIRED = ("attention", "ffn", "shared", "routed")


def adaptable(model: nn.Module) -> dict[str, Kind]:
    """What every parameter is that an adapter can change, by its name: those inside decoder layers of the (text) model alone.

    Linear layers and fused experts ``[E, ...]`` get pairs; routers train themselves.
    """
    paths = module_paths_of(model.config)
    routers, experts, beside = _sparse(model)
    found: dict[str, Kind] = {}
    for path, module in model.named_modules():
        layer = paths.layer_of(f"{path}.")
        if layer is None:
            continue
        if id(module) in routers:
            found |= {f"{path}.{name}": "router" for name, _ in module.named_parameters()}
        elif id(module) in experts:
            fused = {name: weight for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}
            found |= {f"{path}.{name}": "routed" for name in fused}
        elif (
            type(module) is nn.Linear
            and min(module.weight.shape) > 1
            and not _inside(path, model, (*routers, *experts))
        ):
            found[f"{path}.weight"] = _dense_kind(path, layer, model, beside)
    return found


def add_adapter(model: nn.Module, recipe: AdapterRecipe, seed: int) -> None:
    """Give a model pairs beside its weights: they, and routers if these are asked for, are all that can train from now on.

    Args:
        model: a stock model without an adapter.
        recipe: what gets a pair.
        seed: of the run: A is drawn from it and from the parameter's name; B begins at zero.

    Raises:
        UsageError: a word of ``targets`` means nothing in this model.
    """
    known = adaptable(model)
    chosen: set[str] = set()
    for word in recipe.targets:
        matching = {name for name, kind in known.items() if _means(word, name, kind)}
        if not matching:
            there = ", ".join(sorted(set(known.values())))
            raise UsageError(
                f"adapter.targets: '{word}' matches nothing in this {model.config.model_type} model",  # type: ignore[union-attr]
                hint=f"it has {there}; or a pattern with * of names such as {next(iter(known), 'none')}",
            )
        chosen |= matching
    pairs = {}
    for name in (name for name in known if name in chosen and known[name] != "router"):
        weight = model.get_parameter(name)
        module = model.get_submodule(name.rpartition(".")[0])
        turned = weight.ndim == 3 and bool(getattr(module, "is_transposed", False))
        pairs[name] = LowRankPair(weight.detach(), recipe.rank, recipe.scale, turned)
        pairs[name].reset(stream(seed, name, ADAPTER))
    attach(model, pairs, [name for name in known if name in chosen and known[name] == "router"])


def unpaired_warning(model: nn.Module, recipe: AdapterRecipe) -> str | None:
    """Say that routed experts stay as they are, although all targets were asked for: they are no matrices of their own here."""
    experts = _sparse(model)[1]
    if "all" not in recipe.targets or not experts or "routed" in adaptable(model).values():
        return None
    return "the experts of this model are packed into one matrix, and get no pairs: only other layers train"


def _means(word: str, name: str, kind: Kind) -> bool:
    return (
        word == kind
        or (word == "all" and kind in _PAIRED)
        or (("*" in word or "." in word) and fnmatchcase(name, word))
    )


def _sparse(model: nn.Module) -> tuple[set[int], set[int], set[int]]:
    """The modules of routers, of routed experts, and of all that lies in a block with experts, by id."""
    routers, experts, beside = set(), set(), set()
    for place in moe_layers(model) or find_routers(model):
        routers.add(id(place.router))
        experts.add(id(place.experts))
        for block in (place.block, *place.beside):
            beside |= {id(module) for module in block.modules()}
    return routers, experts, beside


def _inside(path: str, model: nn.Module, outer: tuple[int, ...]) -> bool:
    return any(id(model.get_submodule(before)) in outer for before in _above(path))


def _above(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _dense_kind(path: str, layer: int, model: nn.Module, beside: set[int]) -> Kind:
    if id(model.get_submodule(path)) in beside:
        return "shared"
    paths = module_paths_of(model.config)
    inner = path.removeprefix(paths.layer(layer) + ".")
    ffn = (*paths.blocks, *((paths.ends,) if paths.ends else ()))
    return "ffn" if any(inner == block or inner.startswith(f"{block}.") for block in ffn) else "attention"
