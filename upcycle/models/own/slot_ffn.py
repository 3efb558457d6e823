"""Describes FFNs in whose place experts read slots, mixtures of all tokens, as ``config.json`` has them below ``slot_ffns``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from upcycle.errors import CheckpointError
from upcycle.models.own.replaced_ffn import EntryReader, are_paths, is_activation, is_fraction, is_size

_KEYS = (
    *("paths", "hidden_size", "activation", "gated", "bias", "experts", "width", "widths"),
    *("slots", "noise", "expert_dropout", "dropout"),
)


@dataclass(frozen=True)
class SlotFfn:
    """Describes FFNs of one form and size, each of which becomes a :class:`~upcycle.models.own.slots.SlotBlock`.

    Attributes:
        paths: for every FFN the modules that go, below the base model; the experts stand where the first one was.
        hidden_size: d, the length of input and output.
        activation: its name in transformers' table.
        gated: whether neurons are ``act(gate x) * up x``, or ``act(up x)``.
        bias: whether every expert has biases of its own, in front of its activation and behind it.
        widths: neurons of every expert: core experts have more, universal ones fewer.
        slots: that each expert reads.
        noise: in training, normal noise of ``noise / E`` is added to both logits.
        expert_dropout: in training, the probability that an expert's slots are not read by any token.
        dropout: in training, the probability that a number of the output is 0.
    """

    paths: tuple[tuple[str, ...], ...]
    hidden_size: int
    activation: str
    gated: bool
    bias: bool
    widths: tuple[int, ...]
    slots: int = 1
    noise: float = 1.0
    expert_dropout: float = 0.0
    dropout: float = 0.0

    @property
    def experts(self) -> int:
        """E, the number of experts."""
        return len(self.widths)

    def to_json(self) -> dict[str, Any]:
        """Return the entry of ``slot_ffns``."""
        return {**vars(self), "paths": [list(modules) for modules in self.paths], "widths": [*self.widths]}


def slot_ffns_in(config: Any) -> list[SlotFfn]:
    """Return the FFNs of a configuration in whose place experts read slots; none where it has no such key.

    Raises:
        CheckpointError: a key is missing, unknown or of another kind, or an FFN is replaced twice.
    """
    where = f"{config.name_or_path or 'config'}: config.json"
    entries: Any = getattr(config, "slot_ffns", None) or []
    if not isinstance(entries, list | tuple):
        raise CheckpointError(f"{where}: 'slot_ffns' must be a list, got {entries!r}", hint="correct the key")
    found = [_read(EntryReader(entry, f"{where}: 'slot_ffns[{i}]", _KEYS)) for i, entry in enumerate(entries)]
    seen = {path for entry in config.replaced_ffns for modules in entry["paths"] for path in modules}
    for path in (path for ffn in found for modules in ffn.paths for path in modules):
        if path in seen:
            raise CheckpointError(f"{where}: the module '{path}' is replaced twice", hint="correct 'slot_ffns'")
        seen.add(path)
    return found


def _read(entry: EntryReader) -> SlotFfn:
    def flag(value: object) -> bool:
        return type(value) is bool

    noise = entry.get("noise", "a number from 0 to 1", is_fraction, 1.0)
    return SlotFfn(
        paths=tuple(map(tuple, entry.get("paths", "a list of lists of module paths", are_paths))),
        hidden_size=entry.get("hidden_size", "a positive integer", is_size),
        activation=entry.get("activation", "an activation of transformers", is_activation),
        gated=entry.get("gated", "true or false", flag),
        bias=entry.get("bias", "true or false", flag),
        widths=entry.widths(),
        slots=entry.get("slots", "a positive integer", is_size, 1),
        noise=float(noise),
        expert_dropout=float(entry.get("expert_dropout", "a number from 0 to 1", is_fraction, 0.0)),
        dropout=float(entry.get("dropout", "a number from 0 to 1", is_fraction, 0.0)),
    )
