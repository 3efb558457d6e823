"""Describes FFNs that stay, with experts of low rank beside them, as ``config.json`` has them below ``adapted_ffns``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from upcycle.errors import CheckpointError
from upcycle.ffn.router_network import LINEAR, RouterForm
from upcycle.models.own.replaced_ffn import EntryReader, are_paths, is_activation, is_size, with_overrides
from upcycle.models.own.routing.base import RouterRule

_KEYS = (
    *("paths", "hidden_size", "linears", "activation", "rank", "scale", "experts", "universal", "routing"),
    *("clusters", "embedding", "vocabulary", "instruction"),
)
_HINT = "correct the key, or convert the model again"


@dataclass(frozen=True)
class AdaptedFfn:
    """Describes FFNs of one form and size, each of which becomes a :class:`~upcycle.models.own.lora_block.LoraBlock`.

    Attributes:
        paths: the modules of the FFNs, one each, below the base model.
        hidden_size: d, the length of their input and output.
        linears: the linear layers inside each FFN beside which every expert has a pair of thin matrices (LoRA); empty: every expert
            is one adapter behind the FFN, ``U act(D y)`` of its output y.
        activation: of an adapter, its name in transformers' table; empty where ``linears`` is not.
        rank: r, the rows of every thin matrix of one expert.
        scale: what the experts' products are multiplied by.
        experts: E, the routed ones.
        universal: whether one more expert runs for every token, with what the largest routed weight lacks to 1.
        rule: turns logits into experts and weights.
        clusters: of instructions; the router then reads an embedding of the cluster in the place of the token. 0: it reads tokens.
        embedding: the length of these embeddings.
        vocabulary: token ids that the clusters know.
        instruction: how many of a document's first tokens its instruction is.
    """

    paths: tuple[tuple[str, ...], ...]
    hidden_size: int
    linears: tuple[str, ...]
    activation: str
    rank: int
    scale: float
    experts: int
    universal: bool
    rule: RouterRule
    clusters: int = 0
    embedding: int = 32
    vocabulary: int = 0
    instruction: int = 32

    @property
    def router(self) -> RouterForm:
        """The router's form: it has no hidden layer."""
        return LINEAR

    @property
    def router_bias(self) -> bool:
        """The router adds no bias."""
        return False

    @property
    def copies(self) -> int:
        """All experts, the universal one included."""
        return self.experts + self.universal

    @property
    def instructions(self) -> tuple[int, int, int]:
        """What all FFNs of a model must have in common: clusters, vocabulary, and tokens of an instruction."""
        return self.clusters, self.vocabulary, self.instruction

    def to_json(self) -> dict[str, Any]:
        """Return the entry of ``adapted_ffns``."""
        found = {key: value for key, value in vars(self).items() if key != "rule"}
        if not self.clusters:
            found = {k: v for k, v in found.items() if k not in ("clusters", "embedding", "vocabulary", "instruction")}
        routing = {"rule": self.rule.name, **vars(self.rule)}
        return {**found, "paths": [list(m) for m in self.paths], "linears": [*self.linears], "routing": routing}


def adapted_ffns_in(config: Any) -> list[AdaptedFfn]:
    """Return the FFNs of a configuration that have experts of low rank beside them; none where it has no such key.

    Raises:
        CheckpointError: a key is missing, unknown or of another kind, an FFN is there twice, or FFNs differ in their instructions.
    """
    where = f"{config.name_or_path or 'config'}: config.json"
    entries: Any = getattr(config, "adapted_ffns", None) or []
    if not isinstance(entries, list | tuple):
        raise CheckpointError(f"{where}: 'adapted_ffns' must be a list, got {entries!r}", hint=_HINT)
    entries, _ = with_overrides(config, entries)
    found = [_read(EntryReader(entry, f"{where}: 'adapted_ffns[{i}]", _KEYS), where) for i, entry in enumerate(entries)]
    others = (*(config.replaced_ffns or ()), *(getattr(config, "slot_ffns", None) or ()))
    seen = {path for entry in others for modules in entry["paths"] for path in modules}
    for path in (path for ffn in found for modules in ffn.paths for path in modules):
        if path in seen:
            raise CheckpointError(f"{where}: the module '{path}' is replaced twice", hint="correct 'adapted_ffns'")
        seen.add(path)
    if len({ffn.instructions for ffn in found if ffn.clusters}) > 1:
        raise CheckpointError(
            f"{where}: entries of 'adapted_ffns' differ in 'clusters', 'vocabulary' or 'instruction', and a model's instructions are "
            "clustered once",
            hint=_HINT,
        )
    return found


def _read(entry: EntryReader, where: str) -> AdaptedFfn:
    def flag(value: object) -> bool:
        return type(value) is bool

    def names(value: object) -> bool:
        return isinstance(value, list | tuple) and all(isinstance(one, str) and one for one in value)

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf

    experts: int = entry.get("experts", "a positive integer", is_size)
    clusters: int = entry.get("clusters", "an integer that is not negative", lambda v: v == 0 or is_size(v), 0)
    linears = tuple(entry.get("linears", "a list of names of linear layers", names))
    rule = entry.rule(experts)
    paths = tuple(map(tuple, entry.get("paths", "a list of lists of module paths", are_paths)))
    if any(len(modules) > 1 for modules in paths) or not rule.per_token:
        what = "each FFN must be one module" if rule.per_token else f"the rule {rule.name} looks at other tokens"
        raise CheckpointError(f"{where}: 'adapted_ffns' is wrong: {what}", hint=_HINT)
    return AdaptedFfn(
        paths=paths,
        hidden_size=entry.get("hidden_size", "a positive integer", is_size),
        linears=linears,
        activation="" if linears else entry.get("activation", "an activation of transformers", is_activation),
        rank=entry.get("rank", "a positive integer", is_size),
        scale=float(entry.get("scale", "a positive number", number, 1.0)),
        experts=experts,
        universal=entry.get("universal", "true or false", flag, False),
        rule=rule,
        clusters=clusters,
        embedding=entry.get("embedding", "a positive integer", is_size, 32),
        vocabulary=entry.get("vocabulary", "a positive integer", is_size, None if clusters else 1),
        instruction=entry.get("instruction", "a positive integer", is_size, 32),
    )
