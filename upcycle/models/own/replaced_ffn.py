"""Describes FFNs that experts stand in the place of, as ``config.json`` has them below ``replaced_ffns``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from upcycle.errors import CheckpointError
from upcycle.ffn.router_network import LINEAR, RouterActivation, RouterForm
from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.rules import RULES

Bias = Literal["gate", "up", "down", "output"]
_HINT = "correct the key, or convert the model again"
_KEYS = (
    *("paths", "hidden_size", "activation", "gated", "biases", "experts", "width", "widths", "shared_width"),
    *("router", "router_bias", "routing", "dropout", "output_size", "shared_switch", "ranks", "projection"),
)
_ROUTER_KEYS = ("kind", "width", "activation", "absolute", "unit_inputs")


@dataclass(frozen=True)
class ReplacedFfn:
    """Describes FFNs of one form and size, each of which has a router and experts of its own.

    Attributes:
        paths: for every FFN the modules that go, below the base model. The experts stand where the first one was; the others
            (an activation and a second projection that the layer itself calls) do nothing any more.
        hidden_size: d, the length of the input, and, unless ``output_size`` says otherwise, of the output.
        activation: its name in transformers' table.
        gated: whether neurons are ``act(gate x) * up x``, or ``act(up x)``.
        biases: which projections have one: ``down`` is every expert's own (the shared one's, too), weighted as its output is;
            ``output`` ``[d]`` belongs to no expert and is added once.
        widths: neurons of every routed expert.
        shared_width: neurons of the shared expert, which always runs at weight 1; 0: there is none.
        router_bias: whether the router adds a bias to its logits.
        rule: turns logits into experts and weights.
        router: whether the router has a hidden layer, and which (its ``bias`` is not looked at).
        dropout: the probability, in training, that a number of the output is 0, where the FFN had such a layer at its end.
        output_size: d', the length of the output, where it is another one: of a connector between two streams.
        shared_switch: whether the shared expert's output is multiplied by the sigmoid of a product with the input (Qwen2-MoE).
        ranks: where experts' matrices are products of two thin ones, those of every expert: of its first projections together, and of
            its second; empty: they are whole.
        projection: whether they are no FFNs, but projections of attention, which experts imitate (D2DMoE).
    """

    paths: tuple[tuple[str, ...], ...]
    hidden_size: int
    activation: str
    gated: bool
    biases: frozenset[Bias]
    widths: tuple[int, ...]
    shared_width: int
    router_bias: bool
    rule: RouterRule
    dropout: float = 0.0
    router: RouterForm = LINEAR
    output_size: int | None = None
    shared_switch: bool = False
    ranks: tuple[tuple[int, int], ...] = ()
    projection: bool = False

    @property
    def output(self) -> int:
        """The length of the output."""
        return self.hidden_size if self.output_size is None else self.output_size

    @property
    def experts(self) -> int:
        """E, the number of routed experts."""
        return len(self.widths)

    def to_json(self) -> dict[str, Any]:
        """Return the entry of ``replaced_ffns``."""
        same = len(set(self.widths)) == 1
        size: dict[str, Any] = (
            {"experts": self.experts, "width": self.widths[0]} if same else {"widths": [*self.widths]}
        )
        return {
            "paths": [list(modules) for modules in self.paths],
            "hidden_size": self.hidden_size,
            **({} if self.output == self.hidden_size else {"output_size": self.output_size}),
            "activation": self.activation,
            "gated": self.gated,
            "biases": [name for name in get_args(Bias) if name in self.biases],
            **size,
            "shared_width": self.shared_width,
            **({"shared_switch": True} if self.shared_switch else {}),
            **({"ranks": [list(pair) for pair in self.ranks]} if self.ranks else {}),
            "router_bias": self.router_bias,
            **({} if self.router.linear else {"router": _router_json(self.router)}),
            "routing": {"rule": self.rule.name, **vars(self.rule)},
            "dropout": self.dropout,
            **({"projection": True} if self.projection else {}),
        }


def read_replaced(entries: object, where: str) -> list[ReplacedFfn]:
    """Read ``replaced_ffns``; ``where`` names the file in messages.

    Raises:
        CheckpointError: a key is missing, unknown or of another kind, numbers do not fit together, or a module goes twice.
    """
    if not isinstance(entries, list | tuple):
        raise CheckpointError(f"{where}: 'replaced_ffns' must be a list, got {entries!r}", hint=_HINT)
    found = [EntryReader(entry, f"{where}: 'replaced_ffns[{i}]").read() for i, entry in enumerate(entries)]
    seen: set[str] = set()
    for path in (path for ffn in found for modules in ffn.paths for path in modules):
        if path in seen:
            raise CheckpointError(f"{where}: 'replaced_ffns' names the module '{path}' twice", hint=_HINT)
        seen.add(path)
    return found


def replaced_in(config: Any) -> list[ReplacedFfn]:
    """Return the FFNs that a configuration replaces, with the routing parameters that it overrides.

    Raises:
        CheckpointError: an entry is wrong, or an override names neither a parameter of a rule nor an FFN.
    """
    where = f"{config.name_or_path or 'config'}: config.json"
    entries, used = with_overrides(config, config.replaced_ffns)
    _, used_beside = with_overrides(config, getattr(config, "adapted_ffns", None) or [])
    if odd := sorted(set(config.routing or {}) - used - used_beside):
        raise CheckpointError(
            f"{where}: 'routing' has '{odd[0]}', which is no parameter of the model's routing rule and no path of an FFN",
            hint="routing={'top_k': 1}, or routing={'h.3.mlp': {'top_k': 1}}",
        )
    return read_replaced(entries, where)


def with_overrides(config: Any, stored_entries: Any) -> tuple[Any, set[str]]:
    """Return a configuration's entries of FFNs with the routing parameters that it overrides, and which overrides these were."""
    overrides = dict(config.routing or {})
    by_path = {key: value for key, value in overrides.items() if isinstance(value, Mapping)}
    for_all = {key: value for key, value in overrides.items() if key not in by_path}
    if not isinstance(stored_entries, list | tuple):
        return stored_entries, set(overrides)  # what is wrong with the entries is said where they are read
    if not overrides:
        return stored_entries, set()
    entries: list[Any] = []
    used: set[str] = set()
    for entry in stored_entries:
        stored = entry.get("routing") if isinstance(entry, Mapping) else None
        if not isinstance(stored, Mapping) or not isinstance(entry.get("paths"), list | tuple):
            entries.append(entry)
            continue
        for modules in entry["paths"]:
            own = by_path.get(modules[0], {})
            used |= {key for key in for_all if key in stored} | ({modules[0]} & set(by_path))
            routing = {**stored, **{key: value for key, value in for_all.items() if key in stored}, **own}
            entries.append({**entry, "paths": [modules], "routing": routing})
    return entries, used


class EntryReader:
    """Reads one entry of ``replaced_ffns``, or of a list like it; every message begins with the place of the key.

    Args:
        entry: what stands in ``config.json``.
        where: the file, and the place in it.
        keys: all that an entry may have.
    """

    def __init__(self, entry: object, where: str, keys: tuple[str, ...] = _KEYS) -> None:
        self._where = where
        if not isinstance(entry, Mapping):
            raise CheckpointError(f"{where}' must be a mapping, got {entry!r}", hint=_HINT)
        if odd := sorted(set(entry) - set(keys)):
            raise CheckpointError(f"{where}.{odd[0]}' is unknown; known: {', '.join(keys)}", hint=_HINT)
        self._entry = entry

    def read(self) -> ReplacedFfn:
        """Return what the entry describes."""
        paths = self.get("paths", "a list of lists of module paths", are_paths)
        biases = self.get("biases", f"a list of {', '.join(get_args(Bias))}", _are_biases, [])
        gated = self.get("gated", "true or false", lambda v: type(v) is bool)
        if "gate" in biases and not gated:
            raise self._wrong("biases", "names gate, and 'gated' is false")
        widths = self.widths()
        hidden: int = self.get("hidden_size", "a positive integer", is_size)
        return ReplacedFfn(
            paths=tuple(tuple(modules) for modules in paths),
            hidden_size=hidden,
            activation=self.get("activation", "an activation of transformers", is_activation),
            gated=gated,
            biases=frozenset(biases),
            widths=widths,
            shared_width=self.get("shared_width", "an integer that is not negative", lambda v: v == 0 or is_size(v), 0),
            router_bias=self.get("router_bias", "true or false", lambda v: type(v) is bool, False),
            rule=self.rule(len(widths)),
            router=self._router(),
            dropout=float(self.get("dropout", "a number from 0 to 1", is_fraction, 0.0)),
            output_size=self._output(hidden),
            shared_switch=self.get("shared_switch", "true or false", lambda v: type(v) is bool, False),
            ranks=self._ranks(widths, biases),
            projection=self.get("projection", "true or false", lambda v: type(v) is bool, False),
        )

    def _ranks(self, widths: tuple[int, ...], biases: Any) -> tuple[tuple[int, int], ...]:
        """Return the ranks of every expert; none: they are whole."""
        if "ranks" not in self._entry:
            return ()
        pairs = self.get("ranks", "a list of pairs of positive integers", lambda v: _is_list(v, _is_pair))
        if len(pairs) != len(widths):
            raise self._wrong("ranks", f"has {len(pairs)} pairs, and there are {len(widths)} experts")
        if len(set(widths)) > 1 or set(biases) & {"gate", "up", "down"}:
            raise self._wrong("ranks", "is for experts of one width without biases")
        return tuple((int(up), int(down)) for up, down in pairs)

    def _output(self, hidden: int) -> int | None:
        output: int = self.get("output_size", "a positive integer", is_size, hidden)
        return None if output == hidden else output

    def widths(self) -> tuple[int, ...]:
        """Return the neurons of every expert."""
        if "widths" in self._entry:
            if odd := {"experts", "width"} & set(self._entry):
                raise self._wrong("widths", f"and '{min(odd)}' are both there: give a list, or a number and a width")
            widths: list[int] = self.get("widths", "a list of positive integers", lambda v: _is_list(v, is_size))
            return tuple(widths)
        width: int = self.get("width", "a positive integer", is_size)
        return (width,) * int(self.get("experts", "a positive integer", is_size))

    def _router(self) -> RouterForm:
        if "router" not in self._entry:
            return LINEAR
        found = self.get("router", "a mapping", lambda v: isinstance(v, Mapping))
        if odd := sorted(set(found) - set(_ROUTER_KEYS)):
            raise self._wrong(f"router.{odd[0]}", f"is unknown; known: {', '.join(_ROUTER_KEYS)}")
        kind = found.get("kind")
        if kind not in ("linear", "mlp"):
            raise self._wrong("router.kind", f"must be linear or mlp, got {kind!r}")
        if kind == "linear":
            if odd := sorted(set(found) - {"kind"}):
                raise self._wrong(f"router.{odd[0]}", "is there, and a linear router has nothing but a kind")
            return LINEAR
        if not is_size(found.get("width")):
            raise self._wrong("router.width", f"must be a positive integer, got {found.get('width')!r}")
        if found.get("activation") not in get_args(RouterActivation):
            names = " or ".join(get_args(RouterActivation))
            raise self._wrong("router.activation", f"must be {names}, got {found.get('activation')!r}")
        for key in ("absolute", "unit_inputs"):
            if type(found.get(key, False)) is not bool:
                raise self._wrong(f"router.{key}", f"must be true or false, got {found[key]!r}")
        return RouterForm(**{key: value for key, value in found.items() if key != "kind"})

    def rule(self, experts: int) -> RouterRule:
        """Return the rule that ``routing`` describes, for so many experts."""
        routing = dict(self.get("routing", "a mapping", lambda v: isinstance(v, Mapping)))
        name = routing.pop("rule", None)
        if name not in RULES:
            raise self._wrong("routing.rule", f"is {name!r}; rules: {', '.join(RULES)}")
        try:
            rule = RULES[name].of(routing)
        except (ValueError, TypeError) as error:
            raise self._wrong("routing", f"is wrong: {error}") from None
        if problem := rule.check(experts):
            raise self._wrong("routing", f"is wrong: {problem}")
        return rule

    def get(self, key: str, what: str, fits: Any, default: Any = None) -> Any:
        """Return the value of a key, which ``fits`` must take; ``what`` says what it must be."""
        value = self._entry.get(key, default)
        if value is None or not fits(value):
            said = f"must be {what}, got {value!r}" if key in self._entry else f"is missing: it must be {what}"
            raise self._wrong(key, said)
        return value

    def _wrong(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self._where}.{key}' {what}", hint=_HINT)


def _router_json(form: RouterForm) -> dict[str, Any]:
    values = {key: value for key, value in vars(form).items() if key in _ROUTER_KEYS}
    return {"kind": "mlp", **values}


def is_size(value: object) -> bool:
    """Return whether a value is a positive integer."""
    return type(value) is int and 0 < value < 2**31


def is_fraction(value: object) -> bool:
    """Return whether a value is a number from 0 to 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_list(value: object, fits: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(fits, value))


def _is_pair(value: object) -> bool:
    return _is_list(value, is_size) and len(value) == 2  # type: ignore[arg-type]


def are_paths(value: object) -> bool:
    """Return whether a value is a list of lists of module paths."""
    return _is_list(value, lambda modules: _is_list(modules, lambda path: isinstance(path, str) and path))


def _are_biases(value: object) -> bool:
    return isinstance(value, list | tuple) and set(value) <= set(get_args(Bias))


def is_activation(value: object) -> bool:
    """Return whether a value names an activation of transformers."""
    from transformers.activations import ACT2FN

    return isinstance(value, str) and value in ACT2FN
