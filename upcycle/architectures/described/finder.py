"""Finds the FFNs of a stock model that nobody described, by numbers: what the second projection reads is what the first two make."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from upcycle.architectures.described.encoders import SHARED_FFNS
from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace
from upcycle.architectures.described.recorded_calls import Call, differ
from upcycle.errors import RefusalError

_SAME = 1e-5  # relative: fp32, and what is not the same differs by 1e-3 and more
_NUMBERED = re.compile(r"(.*\.)?\d+(?=\.|$)")
_NO_HINT = "describe it (docs/develop/describe_a_model.md), or open an issue with its config.json"


@dataclass(frozen=True)
class WrappableFfn:
    """One FFN that was found: its projections' paths below the base model, and how ``act`` joins them.

    Attributes:
        layer: the path of the numbered module that it is in.
        place: its description, for this layer alone.
        dropouts: the probabilities of dropouts between its projections, which go with it.
        times: how often it runs in one pass.
    """

    layer: str
    place: FfnPlace
    dropouts: tuple[float, ...]
    times: int


class FoundFfns(NamedTuple):
    """The description of a model, how many FFNs were found, and what was found, in words."""

    described: DescribedModel
    ffns: int
    said: str


def describe(facts: DescribedModel, calls: dict[str, Call], preferred: list[str]) -> FoundFfns:
    """Describe the FFNs of a model.

    Args:
        facts: what its class says of itself.
        calls: those of one pass.
        preferred: names of activations that its configuration mentions.

    Raises:
        RefusalError: no FFN is found, or several in one layer, or one that experts cannot take the place of.
    """
    search = _Search(calls, preferred)
    found = list(search.candidates())
    name = facts.name
    if not found:
        near = (
            "; ".join([*search.odd, *search.near.values()][:3])
            or "no numbered layer has two projections that lead there and back"
        )
        raise RefusalError(f"no FFN was found in a {name} model: {near}", hint=_NO_HINT)
    by_layer: dict[str, WrappableFfn] = {}
    for one in found:
        if (other := by_layer.setdefault(one.layer, one)) is not one:
            raise RefusalError(
                f"two FFNs were found in '{one.layer}' of a {name} model: '{_first(other)}' and '{_first(one)}'",
                hint=f"one FFN per layer can be converted; {_NO_HINT}",
            )
    if search.odd:
        raise RefusalError(
            f"{len(found)} FFNs were found in a {name} model, and others that experts cannot stand for: {'; '.join(search.odd[:3])}",
            hint=_NO_HINT,
        )
    places = tuple(dict.fromkeys(one.place for one in found))
    shared = SHARED_FFNS if any(one.times > 1 for one in found) else None
    described = replace(facts, ffns=places, pauses=True, uncalibrated=shared)
    untouched = sorted(set(search.near) - set(by_layer))
    rest = f"; nothing was found in {len(untouched)} layers: {search.near[untouched[0]]}" if untouched else ""
    return FoundFfns(described, len(found), _said(found, described) + rest)


def _first(found: WrappableFfn) -> str:
    return found.place.replaced[0]


def _said(found: list[WrappableFfn], described: DescribedModel) -> str:
    kinds = []
    for place in described.ffns:
        own = [one for one in found if one.place == place]
        form = "act(gate x) * up x" if place.gated else "act(up x)"
        kinds.append(f"{len(own)} FFNs at {place.layer}.{place.replaced[0]}, down({form}) with {place.activation[1:]}")
    text = f"found in a {described.name} model, by one pass with random weights: {'; '.join(kinds)}"
    if any(one.times > 1 for one in found):
        text += (
            f"; layers share FFNs, which run up to {max(one.times for one in found)} times: one set of experts for all"
        )
    if dropouts := {p for one in found for p in one.dropouts if p}:
        text += f"; the dropout inside ({', '.join(map(str, sorted(dropouts)))}) goes: experts have none between projections"
    return text


class _Search:
    """Goes through all pairs of projections of a layer.

    Attributes:
        odd: FFNs that experts cannot take the place of, in words.
        near: what looks like an FFN by its shapes and is none, by layer.
    """

    def __init__(self, calls: dict[str, Call], preferred: list[str]) -> None:
        self._calls, self.odd, self.near = calls, list[str](), dict[str, str]()
        names = [*preferred, *(name for name in ACT2FN if name not in preferred)]
        self._acts = {name: ACT2FN[name] for name in names if name not in ("linear", "xielu")}
        self._linear = {path: call for path, call in calls.items() if _size(call) is not None}

    def candidates(self) -> Iterator[WrappableFfn]:
        """Yield every FFN."""
        layers: dict[str, list[str]] = {}
        for path in self._linear:
            if (match := _NUMBERED.match(path.rpartition(".")[0])) is not None:
                layers.setdefault(match[0], []).append(path)
        for layer, paths in layers.items():
            for down in paths:
                yield from self._with_down(layer, down, paths)

    def _with_down(self, layer: str, down: str, paths: list[str]) -> Iterator[WrappableFfn]:
        hidden, width = _size(self._linear[down])
        ups = [p for p in paths if p != down and _size(self._linear[p]) in ((width, hidden), (2 * width, hidden))]
        best: tuple[float, FfnPlace] | None = None
        read = self._linear[down].x
        for up, gate, fused, made in self._forms(ups, width):
            for name, act in self._acts.items():
                if (error := differ(made(act), read)) < (_SAME if best is None else best[0] / 4):
                    best = error, self._place(layer, up, down, gate, fused, name)
        if best is not None:
            yield from self._placed(layer, best[1])
            return
        parent = down.rpartition(".")[0]
        beside = [p for p in ups if p.rpartition(".")[0] == parent and differ(self._linear[p].x, read) > _SAME]
        if beside and hidden != width:
            between = "a norm, or another function, is between"
            self.near[layer] = f"what '{down}' reads is no activation of what '{beside[0]}' makes: {between}"

    def _place(self, layer: str, up: str, down: str, gate: str | None, fused: Any, act: str) -> FfnPlace:
        columns = isinstance(self._linear[down].module, Conv1D)
        return FfnPlace(layer, up, down, gate=gate, fused=fused, activation=f"={act}", columns=columns)

    def _forms(self, ups: list[str], width: int) -> Iterator[tuple[str, str | None, Any, Any]]:
        """Yield the ways in which projections may be joined: up, gate, the order of a fused gate, and a function of the activation."""
        for up in ups:
            y = self._linear[up].y
            if y.shape[-1] == 2 * width:
                one, two = y.chunk(2, -1)
                yield up, None, "gate up", lambda act, one=one, two=two: act(one) * two
                yield up, None, "up gate", lambda act, one=one, two=two: act(two) * one
                continue
            yield up, None, None, lambda act, y=y: act(y)
            for gate in ups:
                g = self._linear[gate]
                if gate != up and g.y.shape == y.shape and differ(g.x, self._linear[up].x) < _SAME:
                    yield up, gate, None, lambda act, y=y, g=g: act(g.y) * y

    def _placed(self, layer: str, place: FfnPlace) -> Iterator[WrappableFfn]:
        """Yield the FFN where experts can take its place."""
        parts = [path for path in (place.up, place.gate, place.down) if path]
        x, y = self._linear[place.up].x, self._linear[place.down].y
        inside = [path for path in self._calls if path.startswith(f"{layer}.") and path not in parts]
        wholes = [
            path
            for path in inside
            if all(part.startswith(f"{path}.") for part in parts)
            and differ(self._calls[path].x, x) < _SAME
            and differ(self._calls[path].y, y) < _SAME
        ]
        acts = [p for p in inside if self._joins(p, self._linear[place.up].y, self._linear[place.down].x)]
        if wholes:
            whole = max(wholes, key=len)
            weights = sum(weight.numel() for weight in self._calls[whole].module.parameters())
            if weights != sum(w.numel() for part in parts for w in self._linear[part].module.parameters()):
                self.odd.append(
                    f"'{whole}' holds more weights than its projections have: a norm, or a learned activation"
                )
                return
            place = replace(place, whole=whole)
        elif acts and not place.gated:
            place = replace(place, act=max(acts, key=len))
        else:
            self.odd.append(f"the layer '{layer}' computes what is between '{place.up}' and '{place.down}' itself")
            return
        norms = [p for p in inside if _is_norm(self._calls[p]) and differ(self._calls[p].y, x) < _SAME]
        between, end = self._dropouts(place)
        place = replace(place, norm=norms[0] if norms else None, dropout=f"={end}" if end else None)
        yield WrappableFfn(layer, _generalized(place), between, self._linear[place.up].times)

    def _joins(self, path: str, x: torch.Tensor, y: torch.Tensor) -> bool:
        call = self._calls[path]
        leaf = next(call.module.children(), None) is None and next(call.module.parameters(), None) is None
        return leaf and differ(call.x, x) < _SAME and differ(call.y, y) < _SAME

    def _dropouts(self, place: FfnPlace) -> tuple[tuple[float, ...], float]:
        """Return the probabilities of dropouts inside a whole FFN: those before the second projection's end, and the one there."""
        if place.whole is None:
            return (), 0.0
        y = self._linear[place.down].y
        held = [c for p, c in self._calls.items() if p.startswith(f"{place.whole}.") and hasattr(c.module, "p")]
        end = [_probability(call) for call in held if differ(call.x, y) < _SAME]
        return tuple(_probability(c) for c in held if differ(c.x, y) >= _SAME), max(end, default=0.0)


def _size(call: Call) -> Any:
    """Return ``(out, in)`` of a projection; None for any other module."""
    if not isinstance(call.module, nn.Linear | Conv1D):
        return None
    return (call.y.shape[-1], call.x.shape[-1])


def _probability(call: Call) -> float:
    found: Any = getattr(call.module, "p", 0.0)
    return float(found)


def _is_norm(call: Call) -> bool:
    weight = getattr(call.module, "weight", None)
    return weight is not None and weight.ndim == 1 and next(call.module.children(), None) is None


def _generalized(place: FfnPlace) -> FfnPlace:
    """Return the place with paths below the layer, and ``{}`` for the layer's numbers."""

    def below(path: str | None) -> str | None:
        return None if path is None else path.removeprefix(f"{place.layer}.")

    parts: dict[str, Any] = {
        part: below(getattr(place, part)) for part in ("up", "down", "gate", "whole", "act", "norm")
    }
    pattern = ".".join("{}" if part.isdigit() else part for part in place.layer.split("."))
    return replace(place, layer=pattern, **parts)
