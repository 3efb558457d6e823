"""Shows what was done, with a diagram of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.formatting import is_web_address
from upcycle.report.drawing.diagram import layers_diagram
from upcycle.text.reading.plain_text import SELF_WRITTEN
from upcycle.text.text_record import own_text_in


def made_view(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``facts``, each a name, a text, and a link or None, the ``diagram`` of the layers, and ``cuts``, a row each."""
    facts: list[tuple[str, str, str | None]] = []
    for part in ("method", "router"):
        if found := data.get(part):
            facts.append((part, f"{found['title']} ({found['name']})", _link(found["paper"])))
    if data.get("source"):
        facts.append(("source", data["source"], None))
    if data.get("sources"):
        role = "added model" if data.get("kind") == "addition" else "mixed sources"
        facts.append((role, ", ".join(data["sources"]), None))
    facts.append(("architecture", str(data["architecture"]), None))
    if data.get("summary"):
        facts.append((data["kind"], data["summary"], None))
    for key, name in (("scale", "scale of routed experts"), ("refit", "refit")):
        if data.get(key) is not None:
            value = data[key]
            facts.append((name, f"{value:g}" if isinstance(value, float) else str(value), None))
    if calibration := data.get("calibration"):
        own = own_text_in(calibration)
        texts = ", ".join(own if text == SELF_WRITTEN else str(text) for text in calibration.get("text") or [])
        facts.append(("calibrated on", f"{calibration.get('tokens', 0):,} tokens of {texts}", None))
    if data.get("promise"):
        facts.append(("promise", f"{data['promise']}: {data['promise_reason']}", None))
    diagram = layers_diagram(data["layers"]) if data["layers"] else None
    return {"facts": facts, "diagram": diagram, "cuts": [_cut(layer) for layer in data.get("cuts", [])]}


def _cut(layer: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return a compressed layer's index, the source's experts that are left, and what the refit did.

    Merged experts are joined by +; those of which only some neurons are left are followed by the number of these.
    """
    names = ["+".join(map(str, terms)) for terms in layer["experts"]]
    counts = layer.get("neurons") or [None] * len(names)
    experts = ", ".join(
        name if count is None else f"{name} ({count:,})" for name, count in zip(names, counts, strict=True)
    )
    if "kept" in layer:
        experts = "all" if layer["kept"] else "left out"
    if "missing_before" not in layer:
        return str(layer["layer"]), experts, "none"
    return str(layer["layer"]), experts, f"{layer['missing_before']:.1%} missing, then {layer['missing_after']:.1%}"


def _link(paper: str | None) -> str | None:
    """Return the first address in a paper's field, which may hold several; None if it is not a web address."""
    first = (paper or "").split(",")[0].strip()
    return first if is_web_address(first) else None
