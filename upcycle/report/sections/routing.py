"""Shows how the routers choose: load, balance, and which texts and tokens the experts are chosen for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle.report.drawing.frame import Plot
from upcycle.report.drawing.heatmap import heatmap
from upcycle.report.drawing.lines import Series, lines
from upcycle.report.drawing.patches import grid_uri, legend, picture_uri

LOAD_SCALE, COSINE_SCALE = (0.0, 2.0), (-1.0, 1.0)
LOAD_ENDS = ("0", "2 or more")
MOST_ROWS = 2000  # of the table of experts, so that a page of a large model stays light


def routing_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return plots over all layers, and the matrices and top tokens of some."""
    layers = data["layers"]
    dead = [(layer["layer"], layer["dead_experts"]) for layer in layers if layer["dead_experts"]]
    plots = [_load(layers), _violation(layers), _entropy(layers), _similarity(layers)]
    if len(data["domains"]) > 1:
        plots.append(_specialisation(layers, data["domains"]))
    shown = [
        {"layer": part["layer"], "plots": _matrices(part, data["domains"]), "tokens": part["top_tokens"]}
        for part in data["shown"]
    ]
    rows = _experts(data)
    return {
        "columns": ["layer", "expert", "load / ideal load", "most of its own text", "top tokens"],
        "rows": rows[:MOST_ROWS],
        "left_out": f"The first {MOST_ROWS:,} of {len(rows):,}; the JSON file has all."
        if len(rows) > MOST_ROWS
        else "",
        "tokens": data["tokens"],
        "texts": ", ".join(data["domains"]),
        "dead": dead,
        "plots": plots,
        "shown": shown,
        "patches": _patches(data["patches"]) if data.get("patches") else None,
    }


def _experts(data: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for every expert of every layer."""
    shown = {part["layer"]: part for part in data["shown"]}
    rows = []
    for layer in data["layers"]:
        part = shown.get(layer["layer"])
        for expert, load in enumerate(layer["load"]):
            text, tokens = "", ""
            if part is not None:
                loads = [row[expert] for row in part["domain_load"]]
                if len(loads) > 1 and max(loads) > 0:
                    text = f"{data['domains'][loads.index(max(loads))]} {max(loads):.2f}x"
                tokens = " ".join(token["text"].strip() or "(space)" for token in part["top_tokens"][expert])
            rows.append([str(layer["layer"]), str(expert), f"{load:.2f}x", text, tokens])
    return rows


def _patches(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the images with a picture each of the experts of their patches in every layer that is shown."""
    images = [
        {
            "name": image["name"],
            "picture": picture_uri(image["pixels"]),
            "layers": list(zip(data["layers"], map(grid_uri, image["experts"]), strict=True)),
        }
        for image in data["images"]
    ]
    return {"images": images, "legend": legend(max(data["experts"]))}


def _names(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def _load(layers: Sequence[Mapping[str, Any]]) -> Plot:
    worst = max(layers, key=lambda layer: layer["max_violation"])
    expert = max(range(len(worst["load"])), key=worst["load"].__getitem__)
    every = [load for layer in layers for load in layer["load"]]
    idle = sum(load == 0 for load in every)
    low = sum(load < 0.5 for load in every)
    most = max(layer["experts"] for layer in layers)
    return heatmap(
        [layer["load"] for layer in layers],
        title="Are the experts used evenly?",
        reading=(
            f"Orange experts get more than their share, blue ones less. The busiest is expert {expert} of layer "
            f"{worst['layer']} with {worst['load'][expert]:.2f}x; {low / len(every):.0%} get less than half their share, "
            f"{idle:,} get nothing."
        ),
        rows=("layer", [str(layer["layer"]) for layer in layers]),
        columns=("expert", _names(most)),
        scale=LOAD_SCALE,
        unit="load / ideal load",
        ends=LOAD_ENDS,
        wide=True,
    )


def _over_layers(layers: Sequence[Mapping[str, Any]], key: str, **texts: Any) -> Plot:
    values = [math.nan if layer[key] is None else layer[key] for layer in layers]
    series = [Series(key, [layer["layer"] for layer in layers], values)]
    return lines(series, x="layer", whole=True, **texts)


def _violation(layers: Sequence[Mapping[str, Any]]) -> Plot:
    worst = max(layers, key=lambda layer: layer["max_violation"])
    return _over_layers(
        layers,
        "max_violation",
        title="How overloaded is each layer's busiest expert?",
        reading=f"0 is perfect balance, 1 is twice the share. The worst is layer {worst['layer']}: {worst['max_violation']:.2f}.",
        y="MaxVio (max / mean - 1)",
        include=(0.0,),
    )


def _entropy(layers: Sequence[Mapping[str, Any]]) -> Plot:
    worst = min(layers, key=lambda layer: layer["entropy"])
    return _over_layers(
        layers,
        "entropy",
        title="How evenly are tokens spread over experts?",
        reading=f"1 is even, 0 means one expert. The lowest is layer {worst['layer']}: {worst['entropy']:.3f}.",
        y="entropy of the load / log E",
        include=(0.0, 1.0),
    )


def _similarity(layers: Sequence[Mapping[str, Any]]) -> Plot:
    closest = [layer for layer in layers if (layer["router_closest"] or {}).get("cosine") is not None]
    reading = "Near 1, a router cannot tell its experts apart."
    if closest:
        most = max(closest, key=lambda layer: layer["router_closest"]["cosine"])
        first, second = most["router_closest"]["experts"]
        reading += (
            f" The closest pair: {first} and {second} of layer {most['layer']}, {most['router_closest']['cosine']:.2f}."
        )
    return _over_layers(
        layers,
        "router_cosine_mean",
        title="Can the routers tell their experts apart?",
        reading=reading,
        y="mean cosine of router rows",
        include=(0.0, 1.0),
    )


def _specialisation(layers: Sequence[Mapping[str, Any]], domains: Sequence[str]) -> Plot:
    most = max(layers, key=lambda layer: layer["specialisation"])
    return _over_layers(
        layers,
        "specialisation",
        title="Do different texts go to different experts?",
        reading=(
            f"0: {' and '.join(domains)} use the same experts; 1: they share none. The most specialised is layer "
            f"{most['layer']}: {most['specialisation']:.3f}."
        ),
        y="Jensen-Shannon divergence / log D",
        include=(0.0,),
    )


def _matrices(part: Mapping[str, Any], domains: Sequence[str]) -> list[Plot]:
    layer, experts = part["layer"], _names(len(part["router_cosine"]))
    plots = []
    if len(domains) > 1:
        plots.append(
            heatmap(
                part["domain_load"],
                title=f"Layer {layer}: which text goes to which expert?",
                reading=_extreme_domain(part["domain_load"], domains),
                rows=("text", domains),
                columns=("expert", experts),
                scale=LOAD_SCALE,
                unit="load / ideal load within the text",
                ends=LOAD_ENDS,
                wide=True,
            )
        )
    both = ("expert", experts)
    plots.append(
        heatmap(
            part["router_cosine"],
            title=f"Layer {layer}: how similar are the router's rows?",
            reading="Cosine of every two experts' rows; off the diagonal, orange pairs are chosen for the same inputs.",
            rows=both,
            columns=both,
            scale=COSINE_SCALE,
            unit="cosine",
        )
    )
    if part["coselection"]:
        plots.append(
            heatmap(
                part["coselection"],
                title=f"Layer {layer}: which experts are chosen together?",
                reading=_extreme_pair(part["coselection"]),
                rows=both,
                columns=both,
                scale=LOAD_SCALE,
                unit="joint choices / those expected from the loads",
                ends=LOAD_ENDS,
            )
        )
    return plots


def _extreme_domain(loads: Sequence[Sequence[float]], domains: Sequence[str]) -> str:
    value, domain, expert = max((v, d, e) for d, row in enumerate(loads) for e, v in enumerate(row))
    return f"The strongest: expert {expert} gets {value:.2f}x its share of {domains[domain]}."


def _extreme_pair(ratios: Sequence[Sequence[float | None]]) -> str:
    pairs = [(v, i, j) for i, row in enumerate(ratios) for j, v in enumerate(row[:i]) if v is not None]
    if not pairs:
        return "No two experts were chosen together."
    value, first, second = max(pairs)
    return f"Orange pairs work together. The strongest: {second} and {first}, {value:.1f}x as often as expected from their loads."
