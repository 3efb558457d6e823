"""Finds the described FFNs of a stock model and reads their sizes; on the meta device, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from upcycle.architectures.described.ffn_place import DescribedModel, FfnPlace
from upcycle.architectures.module_paths import numbered, submodule
from upcycle.errors import RefusalError


@dataclass(frozen=True)
class FoundFfn:
    """Describes one FFN of one model.

    Attributes:
        place: its description.
        layer: its layer's path below the base model.
        hidden: d.
        width: F.
        activation: its name in transformers' table.
        biases: those of gate, up and down that there are.
        dropout: the probability of a dropout that goes with it.
        norm: the path of the norm before it, below the base model; None: there is none.
        output: the length of what it puts out, which is not d between two streams.
    """

    place: FfnPlace
    layer: str
    hidden: int
    width: int
    activation: str
    biases: frozenset[str]
    dropout: float
    norm: str | None
    output: int

    @property
    def other_output(self) -> int | None:
        """``output`` where that is not d."""
        return None if self.output == self.hidden else self.output

    @property
    def replaced(self) -> tuple[str, ...]:
        """The modules that go, below the base model: experts stand where the first was."""
        return tuple(f"{self.layer}.{path}" for path in self.place.replaced)

    def path(self, part: str) -> str:
        """Return the path of ``gate``, ``up`` or ``down`` below the base model; of a fused gate, that of ``up``."""
        own = getattr(self.place, part)
        return f"{self.layer}.{self.place.up if own is None else own}"


def find_ffns(model: Any, described: DescribedModel) -> list[FoundFfn]:
    """Return every described FFN of a stock model, in the order of towers and layers.

    Args:
        model: a model with its FFNs.
        described: its description.

    Raises:
        RefusalError: its configuration asks for FFNs of another form.
    """
    config = model.config
    for key, (values, why) in described.refused.items():
        if getattr(config, key, values[0]) not in values:
            raise RefusalError(f"config.json: '{key}' is {getattr(config, key)!r}: {why}")
    base = model.base_model
    found = [
        _read(base, config, place, layer)
        for place in described.ffns
        if place.when is None or getattr(config, place.when[0]) == place.when[1]
        for layer in _layers(base, place)
    ]
    if not found:
        raise RefusalError(
            f"a {described.name} model with these settings has no FFN of the form that {described.title} usually has"
        )
    return found


def _layers(base: Any, place: FfnPlace) -> Iterator[str]:
    """Yield the layers' paths that have the place's projections."""
    for path in numbered(base, place.layer):
        held = all(submodule(base, f"{path}.{own}") is not None for own in (place.up, place.gate) if own)
        if held and not (place.unless and submodule(base, f"{path}.{place.unless}") is not None):
            yield path


def _read(base: Any, config: Any, place: FfnPlace, layer: str) -> FoundFfn:
    parts = {
        part: base.get_submodule(f"{layer}.{path}") for part in ("gate", "up", "down") if (path := getattr(place, part))
    }
    if place.fused:
        parts = {"gate": parts["up"], **parts}
    shape, read = (tuple(parts[part].weight.shape) for part in ("down", "up"))
    output, width = shape[::-1] if place.columns else shape
    named = place.activation.removeprefix("=")
    settings = getattr(config, place.config) if place.config else config
    norms = (place.norm or "").split("|")
    return FoundFfn(
        place=place,
        layer=layer,
        hidden=read[0] if place.columns else read[1],
        width=width,
        activation=named if place.activation.startswith("=") else getattr(settings, named),
        biases=frozenset(part for part, module in parts.items() if module.bias is not None),
        dropout=_probability(config, place.dropout) if place.dropout else 0.0,
        norm=next((f"{layer}.{n}" for n in norms if n and submodule(base, f"{layer}.{n}") is not None), None),
        output=output,
    )


def _probability(config: Any, key: str) -> float:
    return float(key[1:] if key.startswith("=") else getattr(config, key))
