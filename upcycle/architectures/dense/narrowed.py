"""Describes a dense model whose FFNs have fewer neurons, and whose heads may have fewer dimensions, in the same architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.stock_classes import stock_shapes
from upcycle.architectures.tensor_origin import Origin

_KINDS = ("gate", "up", "down", "gate_bias", "up_bias")  # the parts of an FFN that have a size per neuron
_ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the length of a text
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class MadeTensor(Origin):
    """The origin of a tensor of ``shape`` that is computed from ``name`` and others; ``part`` says which it is."""

    shape: tuple[int, ...] = ()
    part: str = ""


class NarrowSizes(NamedTuple):
    """The sizes of a narrower model: neurons of every FFN, dimensions of every head."""

    width: int
    head: int


class KeptPairs(NamedTuple):
    """Which pairs of a head's dimensions are kept, in all heads and layers alike.

    Attributes:
        pairs: ascending; pair i consists of the dimensions i and i + D/2.
        periods: the period of each, in positions over 2 pi.
        factor: what the rotary embedding multiplies queries and keys by.
    """

    pairs: tuple[int, ...]
    periods: tuple[float, ...]
    factor: float

    @classmethod
    def first(cls, head: int) -> KeptPairs:
        """Return a choice of the right size, before one is made."""
        count = head // 2
        return cls(tuple(range(count)), (1.0,) * count, 1.0)


def narrowed_config(
    family: Family, dense: DenseConfig, raw: Mapping[str, Any], sizes: NarrowSizes, kept: KeptPairs
) -> dict[str, Any]:
    """Return the ``config.json`` of the narrower model.

    A head's rotary embedding has evenly spaced frequencies for its number of dimensions. Those of some pairs are others, which the
    ``longrope`` type holds one by one (theta 1, and the periods as factors; see :func:`upcycle.architectures.rope.masked_rope`).
    """
    config = family.narrowed(raw, sizes.width)
    if sizes.head == dense.head_dim:
        return config
    config = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "short_factor": [*kept.periods],
        "long_factor": [*kept.periods],
        "factor": 1.0,
        "attention_factor": kept.factor,
        "original_max_position_embeddings": dense.max_position_embeddings,
    }
    return {**config, "head_dim": sizes.head, "rope_parameters": rope}


def why_heads_stay(family: Family, dense: DenseConfig, raw: Mapping[str, Any]) -> str:
    """Return why heads of this model cannot have fewer dimensions; empty: they can."""
    if dense.query_norms:
        return "queries and keys are normed over all their dimensions, which a norm over fewer does not equal"
    for layer in range(dense.num_hidden_layers):
        prefix = f"{family.module_paths.layer(layer)}."
        names = {name.removeprefix(prefix).removesuffix(".bias") for name in family.layer_specs(dense, layer)}
        usual = {f"self_attn.{part}.weight" for part in _PROJECTIONS} | {f"self_attn.{part}" for part in _PROJECTIONS}
        usual |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
        if not names <= usual or not usual - names <= {f"self_attn.{part}" for part in _PROJECTIONS}:
            return f"layer {layer} has other parts than an attention of four projections between two norms"
    if family.rotates_pairs or dense.rotated_dim != dense.head_dim or len(set(dense.thetas)) > 1 or dense.head_dim < 4:
        return "its rotary embedding is not the same for whole heads in every layer"
    if dense.rope_parameters["rope_type"] not in _ROPES:
        return f"the frequencies of its rotary embedding depend on the text's length ({dense.rope_parameters['rope_type']})"
    head = dense.head_dim - 2
    shapes = stock_shapes(
        narrowed_config(family, dense, raw, NarrowSizes(dense.intermediate_size, head), KeptPairs.first(head))
    )
    query = shapes[f"{family.module_paths.layer(0)}.self_attn.q_proj.weight"]
    if query[0] != dense.num_attention_heads * head:
        return "its class takes the dimensions of a head from the hidden size, and reads no 'head_dim'"
    return ""


def ffn_parts(family: Family, dense: DenseConfig, layer: int) -> dict[str, list[str]]:
    """Return, for each stored tensor of an FFN that has a size per neuron, the parts that it holds, in the order of its rows."""
    found: dict[str, list[str]] = {}
    origins = {kind: origin for kind, origin in family.ffn_origins(dense, layer).items() if kind in _KINDS}
    for kind, origin in sorted(origins.items(), key=lambda pair: (pair[1].rows or (0, 0))[0]):
        found.setdefault(origin.name, []).append(kind)
    return found


def head_parts(family: Family, dense: DenseConfig, layer: int) -> dict[str, str]:
    """Return the names of the tensors of an attention that have a size per dimension of a head, by part (``q``, ``q_bias``, ``o``)."""
    prefix = f"{family.module_paths.layer(layer)}.self_attn."
    found = {part[0]: f"{prefix}{part}.weight" for part in _PROJECTIONS}
    if dense.qkv_bias:
        found |= {f"{part[0]}_bias": f"{prefix}{part}.bias" for part in _PROJECTIONS[:3]}
    return found


def made_tensors(family: Family, dense: DenseConfig, layer: int, sizes: NarrowSizes) -> dict[str, MadeTensor]:
    """Return the origins of the tensors of a layer that are not the dense model's, by their stored names."""
    d, width = dense.hidden_size, sizes.width
    made: dict[str, MadeTensor] = {}
    if width != dense.intermediate_size:
        for name, kinds in ffn_parts(family, dense, layer).items():
            rows = width * len(kinds)
            shape = (d, width) if kinds == ["down"] else (rows,) if kinds[0].endswith("_bias") else (rows, d)
            made[name] = MadeTensor(name, shape=shape, part="ffn")
    if sizes.head != dense.head_dim:
        sizes_of = {"q": dense.num_attention_heads * sizes.head}
        sizes_of |= dict.fromkeys(("k", "v"), dense.num_key_value_heads * sizes.head)
        for part, name in head_parts(family, dense, layer).items():
            own = sizes_of["q"] if part == "o" else sizes_of[part[0]]
            shape = (d, own) if part == "o" else (own,) if part.endswith("_bias") else (own, d)
            made[name] = MadeTensor(name, shape=shape, part="attention")
    return made


def pair_rows(heads: int, head: int, pairs: Sequence[int]) -> list[int]:
    """Return the rows of a projection of ``heads`` heads that hold some pairs of dimensions, in halves."""
    own = [*pairs, *(pair + head // 2 for pair in pairs)]
    return [first * head + row for first in range(heads) for row in own]
