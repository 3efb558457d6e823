"""Finds the dense model that a stock Mixture-of-Experts is, but for its FFNs: family, ``config.json``, and where its tensors are.

A family may be it whose models this version converts into the MoE's architecture. It is, where that conversion leads back: from the
dense ``config.json`` to every key of the MoE's that is not of its experts, and from every tensor outside the FFN to the same tensor,
under whatever name, unchanged. Nothing else may be stored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.moe.base import Target
from upcycle.architectures.stock import build_config
from upcycle.architectures.stored_moe import MoeModel
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import RefusalError, UpcycleError, UsageError
from upcycle.ffn.moe_shape import MoeShape
from upcycle.registry import FAMILIES, TARGETS, load, suggestion

# Keys that say how large the experts are, how they are chosen, or nothing about the function.
_OF_EXPERTS = frozenset(
    (
        "architectures",
        "dtype",
        "use_cache",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "intermediate_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "n_shared_experts",
        "num_shared_experts",
        "moe_num_shared_experts",
        "num_experts_per_tok",
        "moe_topk",
        "norm_topk_prob",
        "mlp_only_layers",
        "decoder_sparse_step",
        "first_k_dense_replace",
        "num_dense_layers",
        "num_nextn_predict_layers",
        "routed_scaling_factor",
        "use_expert_bias",
        "n_group",
        "topk_group",
        "expert_selection_fn",
        "shared_expert_combination_strategy",
        "prefix_dense_intermediate_size",
        "prefix_dense_sliding_window_pattern",
        "max_window_layers",
        "model_type",
    )
)
_NOT_SETTINGS = ("architectures", "model_type", "transformers_version", "_name_or_path", "id2label", "label2id")
_SPELT_AS_FILED = ("rope_theta", "rope_scaling", "dtype", "torch_dtype")


@dataclass(frozen=True)
class DenseTwin:
    """Describes a dense model that equals a MoE outside the FFN.

    Attributes:
        family: its architecture.
        config: its ``config.json``, with FFNs of the width that was asked for.
        dense: the same, read.
        outside: for every layer (None: outside the layers) its tensors outside the FFN, and the stored tensors that they are.
    """

    family: Family
    config: dict[str, Any]
    dense: DenseConfig
    outside: Mapping[int | None, Mapping[str, Origin]]


def dense_twin(
    model: MoeModel, width: int, wanted: str, made_of: str = "", where: str = "the model", hint: str = ""
) -> DenseTwin:
    """Return the dense model, with FFNs of ``width`` neurons.

    Args:
        model: the MoE.
        width: the neurons of every FFN.
        wanted: a family, or ``auto``: the first that fits.
        made_of: the family that the MoE was made of, which is tried first; empty: not known.
        where: the MoE's name in messages.
        hint: what else can be done where none fits; empty: the usual.

    Raises:
        UsageError: no family has the wanted name.
        RefusalError: none fits, or not the wanted one; the message says why.
    """
    name = model.family.name
    if model.family.parts:
        raise RefusalError(
            f"{where}: a '{name}' model has other parts beside its text model, and dense models and upcycle_moe are made of text "
            "models alone",
            hint=hint or "methods that leave out or merge experts keep the architecture: --method naee --keep 0.5",
        )
    if model.family.clamped:
        raise RefusalError(
            f"{where}: the experts of a '{name}' model have biases and a clamped activation, as no dense FFN made of them here has",
            hint=hint or "methods that leave out or merge experts keep the architecture: --method naee --keep 0.5",
        )
    able = [family for family in FAMILIES if name in load("family", family).targets] if name in TARGETS else []
    if wanted != "auto" and wanted not in FAMILIES:
        raise UsageError(
            f"unknown dense family '{wanted}'", hint=suggestion(wanted, ["auto", *able] if able else FAMILIES)
        )
    if wanted != "auto" and wanted not in able:
        said = f"of {name} these can be: {', '.join(able)}" if able else "no other is known to be, either"
        raise RefusalError(f"{where}: a '{name}' model without its experts is no '{wanted}' model", hint=said)
    tried = [wanted] if wanted != "auto" else sorted(able, key=lambda family: family != made_of)  # stable
    why = {}
    for family in tried:
        try:
            return _twin(model, width, load("family", family)(), load("target", name)())
        except _UnlikeError as error:
            why[family] = str(error)
    reasons = "; ".join(f"{family}: {reason}" for family, reason in why.items())
    raise RefusalError(
        f"{where}: no dense architecture known here has the block of this '{name}' model"
        + (f" ({reasons})" if reasons else ""),
        hint=hint or "methods that leave out or merge experts keep the architecture: --method naee --keep 0.5",
    )


class _UnlikeError(Exception):
    """A family's models are not the MoE outside the FFN; the message says why."""


def _twin(model: MoeModel, width: int, family: Family, target: Target) -> DenseTwin:
    config = _config(model, family, width)
    try:
        dense = family.config(config)
    except UpcycleError as error:
        raise _UnlikeError(error.message) from None
    if dense.mlp_bias or not dense.mlp_gated or any(origin.rows for origin in family.ffn_origins(dense, 0).values()):
        raise _UnlikeError("its FFN is another one")
    if dense.intermediate_size != width:
        raise _UnlikeError(f"its FFN cannot have {width} neurons")
    _compare_configs(model, target, dense)
    layers: tuple[int | None, ...] = (None, *range(dense.num_hidden_layers))
    return DenseTwin(family, config, dense, {layer: _outside(model, family, target, dense, layer) for layer in layers})


def _config(model: MoeModel, family: Family, width: int) -> dict[str, Any]:
    """Return the dense ``config.json``: every key of the dense class that the MoE's class has, too, with the MoE's value."""
    stock = model.stock
    keys = build_config({"model_type": family.name}, family.name).to_dict()
    content = stock.to_dict()
    config = {key: content[key] for key in keys if key in content and key not in _NOT_SETTINGS}
    config |= {key: model.raw[key] for key in _SPELT_AS_FILED if key in model.raw}
    if not _window(stock):
        config.pop("sliding_window", None)
        config |= {"sliding_window": None} if "sliding_window" in keys else {}
    config["model_type"] = family.name
    return family.narrowed(config, width)


def _window(stock: Any) -> int | None:
    """Return the length of the window that some layer has."""
    kinds = getattr(stock, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(stock, "sliding_window", None) or None


def _compare_configs(model: MoeModel, target: Target, dense: DenseConfig) -> None:
    """Compare what the conversion of the dense model would write with the MoE's own values.

    Raises:
        _UnlikeError: a value differs.
    """
    shape = MoeShape(
        experts=model.experts,
        top_k=model.top_k,
        shared=1,
        expert_size=model.expert_width,
        moe_layers=tuple(range(model.layers)),
        form=dense.ffn_form,
    )
    written = target.full_config(dense, shape, "float32")
    back, stock = build_config(written, target.name), build_config(model.raw, target.name)
    for key in written:
        if key in _OF_EXPERTS or not hasattr(stock, key):
            continue
        made, own = (_window(c) if key == "sliding_window" else getattr(c, key, None) for c in (back, stock))
        if made != own:
            raise _UnlikeError(f"'{key}' is {own!r} here, and would be {made!r}")
    if getattr(stock, "shared_expert_combination_strategy", "sum") != "sum" and getattr(stock, "num_shared_experts", 0):
        raise _UnlikeError("'shared_expert_combination_strategy' halves the experts' sum")


def _outside(
    model: MoeModel, family: Family, target: Target, dense: DenseConfig, layer: int | None
) -> dict[str, Origin]:
    """Return the tensors of the dense model outside its FFN, of one layer.

    Raises:
        _UnlikeError: the MoE stores one in another form, or one more.
    """
    shapes = family.first_specs(dense) | family.last_specs(dense) if layer is None else family.layer_specs(dense, layer)
    found: dict[str, Origin] = {}
    for name, shape in shapes.items():
        stored = target.written(dense, family.module_paths.renamed(name, target.module_paths))
        if target.origin(family, dense, name) != Origin(name):
            raise _UnlikeError(f"'{stored}' is stored in another form")
        if stored not in model.specs or model.specs[stored].shape != tuple(shape):
            raise _UnlikeError(f"it has '{name}' of shape {list(shape)}")
        found[name] = Origin(stored)
    used = {origin.name for origin in found.values()} | set(beside_routed(model, layer).values())
    for name in model.names.get(layer, []):
        if name not in used and model.role(name) == "other" and not _SWITCH.fullmatch(name):
            raise _UnlikeError(f"it has no '{name}'")
    return found


_FFN = re.compile(r".+\.(gate_proj|up_proj|down_proj|w1|w3|w2|input_linear|output_linear)\.weight")
_SWITCH = re.compile(r".+\.shared_expert_gate\.weight")
_PARTS = {
    **{"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "input_linear": "gate_up"},
    **{"down_proj": "down", "w2": "down", "output_linear": "down"},
}


def beside_routed(model: MoeModel, layer: int | None) -> dict[str, str]:
    """Return the stored tensors of a layer's shared experts, or of the FFN of a layer without a router.

    They are ``gate`` and ``up`` ``[F, d]`` (or both, one after another: ``gate_up``) and ``down`` ``[d, F]``.
    """
    return dict(_beside_routed(model, layer)) if layer is not None else {}


def _beside_routed(model: MoeModel, layer: int) -> Iterator[tuple[str, str]]:
    for name in model.names[layer]:
        if model.role(name) == "other" and (match := _FFN.fullmatch(name)):
            yield _PARTS[match[1]], name


def width_beside(model: MoeModel, layer: int) -> int:
    """Return the number of neurons of a layer's shared experts, or of its FFN where it has no router; 0: there are none."""
    down = beside_routed(model, layer).get("down")
    return 0 if down is None else model.specs[down].shape[-1]
