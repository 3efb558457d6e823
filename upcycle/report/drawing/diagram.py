"""Draws how the layers are built, as blocks whose widths are their numbers of neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

_MOST_BLOCKS = 48
_WIDTH = 1000.0


def layers_diagram(layers: Sequence[Mapping[str, Any]]) -> Markup:
    """Return a figure with a row for each stretch of layers that are built alike."""
    groups = [list(group) for _, group in groupby(layers, key=_shape)]
    widest = max(_neurons(layer) for layer in layers) or 1
    rows, words = [], []
    for group in groups:
        first, last = group[0]["layer"], group[-1]["layer"]
        name = f"layer {first}" if first == last else f"layers {first} to {last}"
        text = _words(group[0])
        words.append(f"{name}: {text}")
        rows.append(
            Markup(
                '<span class="name">{}</span><svg class="row" viewBox="0 0 1000 100" preserveAspectRatio="none" '
                'aria-hidden="true">{}</svg><span class="value">{}</span>'
            ).format(name, _blocks(group[0], _WIDTH / widest), text)
        )
    return Markup(
        '<figure class="plot wide"><figcaption><strong>How the layers are built.</strong> The width of a block is its '
        "number of neurons. Grey and orange blocks run for every token; the router chooses among the blue ones.</figcaption>"
        '<div class="diagram area" role="img" aria-label="{}">{}</div><div class="xlabel">neurons of the FFN</div>'
        '<div class="legend"><span><i class="block dense"></i>dense</span><span><i class="block shared"></i>shared expert'
        '</span><span><i class="block routed"></i>routed expert</span></div></figure>'
    ).format("How the layers are built. " + "; ".join(words), Markup("").join(rows))


def _shape(layer: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(layer[key] for key in ("kind", "shared", "routed", "top_k", "neurons", "shared_neurons"))


def _neurons(layer: Mapping[str, Any]) -> int:
    routed = layer["routed"] * layer["neurons"] if layer["kind"] == "moe" else layer["neurons"]
    return int(layer["shared_neurons"] + routed)


def _words(layer: Mapping[str, Any]) -> str:
    if layer["kind"] == "dense":
        return f"dense, {layer['neurons']:,} neurons"
    shared = f"{layer['shared']} shared + " if layer["shared"] else ""
    return f"{shared}{layer['top_k']} of {layer['routed']} routed experts, {layer['neurons']:,} neurons each"


def _blocks(layer: Mapping[str, Any], per_neuron: float) -> Markup:
    if layer["kind"] == "dense":
        return _rect("dense", 0.0, layer["neurons"] * per_neuron)
    found, position = [], 0.0
    for kind, count, neurons in (
        ("shared", layer["shared"], layer["shared_neurons"]),
        ("routed", layer["routed"], layer["routed"] * layer["neurons"]),
    ):
        # More blocks would be too narrow to see, so many experts are drawn as groups.
        blocks = min(count, _MOST_BLOCKS)
        for _ in range(blocks):
            width = neurons * per_neuron / blocks
            found.append(_rect(kind, position, width))
            position += width
    return Markup("").join(found)


def _rect(kind: str, x: float, width: float) -> Markup:
    gap = min(4.0, width * 0.2)
    return Markup('<rect class="{}" x="{:.1f}" y="8" width="{:.1f}" height="84"/>').format(kind, x, width - gap)
