"""A stock Mixture-of-Experts as ``upcycle_moe``: the dense model with its block, where experts and routers stand in the place of FFNs.

What no stock class holds can then be done to it: another number of experts in every layer, or another rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from upcycle.architectures.clean_settings import clean_config
from upcycle.architectures.expert_terms import FactorName, FactorRows, LayerCut, PackedMatrix
from upcycle.architectures.moe.dense_twin import DenseTwin, beside_routed, dense_twin, width_beside
from upcycle.architectures.moe.wrapper import UpcycleMoe
from upcycle.architectures.stock import build_config
from upcycle.architectures.stock_auto import class_name
from upcycle.architectures.stored_moe import ExpertRows, MoeModel, is_down
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import RefusalError
from upcycle.models.own.configuration import wrapped_json
from upcycle.models.own.replaced_ffn import ReplacedFfn
from upcycle.models.own.routing.base import RouterRule
from upcycle.models.own.routing.biased_top_k import BiasedTopKRule
from upcycle.models.own.routing.top_k import TopKRule

_ELSE = "leave --target out: the architecture stays as it is"


@dataclass(frozen=True)
class WrappedMoe:
    """Describes such a model.

    Attributes:
        config: its ``config.json``.
        tensors: for every layer (None: outside the layers) its tensors by name, and where each comes from.
        first: the names of those that are written before the layers.
    """

    config: dict[str, Any]
    tensors: Mapping[int | None, Mapping[str, Origin]]
    first: frozenset[str]


def wrapped_moe(
    model: MoeModel,
    cuts: Mapping[int, LayerCut],
    rules: Callable[[int], RouterRule],
    made_of: str = "",
    where: str = "the model",
) -> WrappedMoe:
    """Describe a MoE as ``upcycle_moe``.

    Args:
        model: the MoE.
        cuts: for every layer with a router, what its experts are made of.
        rules: returns the routing rule of a layer, such as :func:`stock_rule`.
        made_of: the family that the MoE was made of; empty: not known.
        where: its name in messages.

    Raises:
        RefusalError: no dense family has its block, or its layers without experts have FFNs of several widths.
    """
    if model.family.sparse_mixer:
        raise RefusalError(
            f"{where}: no router of upcycle_moe weighs experts as SparseMixer does, by which '{model.family.name}' routes",
            hint=_ELSE,
        )
    twin = dense_twin(model, _dense_width(model, where), "auto", made_of, where, _ELSE)
    names = {layer: _roles(model, layer) for layer in model.moe_layers}
    replaced = _replaced(model, twin, cuts, rules, names)
    config = clean_config(wrapped_json(twin.family.rewritten(twin.dense.raw), replaced))
    config["architectures"] = [f"{UpcycleMoe.architecture}{class_name(build_config(twin.dense.raw, 'config.json'))}"]
    tensors: dict[int | None, Mapping[str, Origin]] = {None: twin.outside[None]}
    for layer in range(model.layers):
        own = _block(model, twin, layer, cuts[layer], names[layer]) if layer in cuts else _ffn(model, twin, layer)
        tensors[layer] = {**twin.outside[layer], **own}
    return WrappedMoe(config, tensors, frozenset(twin.family.first_specs(twin.dense)))


def stock_rule(model: MoeModel, top_k: int, biased: bool) -> TopKRule:
    """Return the rule that the routers of a stock class follow.

    Args:
        model: the MoE.
        top_k: experts per token.
        biased: whether a bias is added to the scores for the choice.
    """
    scores: Any = "sigmoid" if model.sigmoid else "softmax"
    factor = float(getattr(model.stock, "routed_scaling_factor", None) or 1.0)
    epsilon = model.family.epsilon if model.normalized else 0.0
    if biased or factor != 1 or epsilon:
        return BiasedTopKRule(top_k, scores, model.normalized, biased, factor, epsilon)
    return TopKRule(top_k, scores, model.normalized)


def has_bias(model: MoeModel, layer: int) -> bool:
    """Return whether a bias is added to the scores of a layer's router for the choice."""
    return "bias" in _roles(model, layer)


def _dense_width(model: MoeModel, where: str) -> int:
    """Return the width of the FFNs of layers without experts; that of an expert where there are none."""
    found = {width_beside(model, layer) for layer in range(model.layers) if layer not in model.moe_layers}
    if len(found) > 1:
        raise RefusalError(
            f"{where}: its layers without experts have FFNs of several widths ({', '.join(map(str, sorted(found)))}), and those of a "
            "dense model have one",
            hint=_ELSE,
        )
    return found.pop() if found else model.expert_width


def _roles(model: MoeModel, layer: int) -> dict[str, str]:
    """Return the stored tensors of a router, its bias, what switches the shared experts (``switch``), and an expert (``down``)."""
    found: dict[str, str] = {}
    for name in model.names[layer]:
        role = model.role(name)
        if role in ("router", "bias"):
            found[role] = name
        elif role == "other" and name.endswith(".shared_expert_gate.weight"):
            found["switch"] = name
        elif is_down(name):
            found.setdefault("down", name)
    return found


def _width(model: MoeModel, cut: LayerCut) -> int:
    """Return the neurons of every expert of a cut."""
    order = cut.experts[0][0].order
    return model.expert_width if order is None else len(order)


def _replaced(
    model: MoeModel,
    twin: DenseTwin,
    cuts: Mapping[int, LayerCut],
    rules: Callable[[int], RouterRule],
    names: Mapping[int, Mapping[str, str]],
) -> list[ReplacedFfn]:
    alike: dict[tuple[Any, ...], list[int]] = {}
    for layer, cut in cuts.items():
        kind = (
            (_width(model, cut),) * len(cut.experts),
            width_beside(model, layer),
            "switch" in names[layer],
            rules(layer),
            cut.ranks,
        )
        alike.setdefault(kind, []).append(layer)
    return [
        ReplacedFfn(
            paths=tuple(twin.family.replaced_modules(layer) for layer in layers),
            hidden_size=model.hidden_size,
            activation=twin.dense.ffn_form.activation,
            gated=True,
            biases=frozenset(),
            widths=widths,
            shared_width=shared,
            router_bias=False,
            rule=rule,
            shared_switch=switch,
            ranks=ranks,
        )
        for (widths, shared, switch, rule, ranks), layers in alike.items()
    ]


def _block(model: MoeModel, twin: DenseTwin, layer: int, cut: LayerCut, names: Mapping[str, str]) -> dict[str, Origin]:
    """Return the tensors of a layer's router and experts."""
    prefix, neurons, d = (
        twin.family.module_paths.block_of(layer),
        _width(model, cut) * len(cut.experts),
        model.hidden_size,
    )
    found: dict[str, Origin] = {f"{prefix}.router.weight": ExpertRows(names["router"], taken=cut.rows)}
    if "bias" in names:
        flat: Any = "vector" if model.is_flat(names["bias"]) else ""
        found[f"{prefix}.router.e_score_correction_bias"] = ExpertRows(names["bias"], taken=cut.rows, flat=flat)
    if cut.ranks:
        up, down = (sum(ranks) for ranks in zip(*cut.ranks, strict=True))
        width = model.expert_width
        factors: dict[FactorName, tuple[int, int]] = {
            **{"up_in": (up, d), "up_out": (up, 2 * width)},
            **{"down_in": (down, width), "down_out": (down, d)},
        }
        for factor, sizes in factors.items():
            name = f"{prefix}.experts.{factor}"
            found[name] = FactorRows(names["down"], layer=layer, part=factor, sizes=sizes)
    for part, rows in () if cut.ranks else (("gate_up", 2 * neurons), ("down", neurons)):
        kind: Any = part
        found[f"{prefix}.experts.{part}"] = PackedMatrix(
            names["down"], layer=layer, part=kind, experts=cut.experts, sizes=(rows, d)
        )
    found |= {f"{prefix}.shared_{part}.weight": origin for part, origin in _matrices(model, layer).items()}
    if "switch" in names:
        found[f"{prefix}.shared_switch.weight"] = Origin(names["switch"])
    return found


def _ffn(model: MoeModel, twin: DenseTwin, layer: int) -> dict[str, Origin]:
    """Return the tensors of the FFN of a layer without experts."""
    names = twin.family.ffn_names(layer)
    return {names[part]: origin for part, origin in _matrices(model, layer).items()}


def _matrices(model: MoeModel, layer: int) -> dict[str, Origin]:
    """Return gate, up and down of a layer's shared experts, or of its FFN; empty: there are none."""
    found: dict[str, Origin] = {}
    for part, name in beside_routed(model, layer).items():
        if part != "gate_up":
            found[part] = Origin(name)
            continue
        half = model.specs[name].shape[0] // 2
        found |= {"gate": Origin(name, rows=(0, half)), "up": Origin(name, rows=(half, half))}
    return found
