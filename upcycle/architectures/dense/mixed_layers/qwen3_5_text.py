"""Qwen3.5 dense, its text model: gated attention between gated-delta-net layers, norms of ``1 + w``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.tensor_origin import Origin
from upcycle.files.formats.settings import FLAG, NAMES, SIZE

_LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


class Qwen35Text(Family):
    """Describes Qwen3.5's text model. Norms apply ``1 + w``, as in its MoE relative: only a router's bound needs the sum."""

    name = "qwen3_5_text"
    title = "Qwen3.5 (text)"
    targets = ("qwen3_5_moe_text",)
    partial_rotary_factor = 0.25
    defaults = {
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    keys = {
        **dict.fromkeys(_LINEAR, SIZE),
        "attention_bias": FLAG,
        "full_attention_interval": SIZE,
        "head_dim": SIZE,
        "layer_types": NAMES.optional,
    }
    layer_kinds = ("full_attention", "linear_attention")

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the linear layers and their keys; ``attention_bias`` puts a bias on all four projections of the others."""
        bias, interval = bool(raw.get("attention_bias")), raw.get("full_attention_interval", 4)
        kinds = raw.get("layer_types") or [
            "linear_attention" if (layer + 1) % interval else "full_attention"
            for layer in range(values["num_hidden_layers"])
        ]
        extra = {"layer_types": kinds, **{key: raw.get(key, default) for key, default in _LINEAR.items()}}
        special = frozenset({Feature.GATED_ATTENTION})
        return {"qkv_bias": bias, "output_bias": bias, "special": special, "extra": extra}

    def ffn_origins(self, config: DenseConfig, layer: int) -> dict[str, Origin]:
        """Return Llama's origins; the norm applies ``1 + w``, so 1 is added to the stored weight."""
        origins = super().ffn_origins(config, layer)
        return {**origins, "norm": Origin(origins["norm"].name, add=1.0)}

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return Llama's layer with a gate beside the queries, or with a gated delta net in place of attention."""
        specs, prefix = super().layer_specs(config, layer), self.module_paths.layer(layer)
        if config.extra["layer_types"][layer] == "linear_attention":
            others = {name: shape for name, shape in specs.items() if ".self_attn." not in name}
            return {**others, **_delta_net(config, f"{prefix}.linear_attn")}
        queries, d = 2 * config.num_attention_heads * config.head_dim, config.hidden_size
        gated = {
            "q_proj.weight": (queries, d),
            "q_norm.weight": (config.head_dim,),
            "k_norm.weight": (config.head_dim,),
        }
        if config.qkv_bias:
            gated["q_proj.bias"] = (queries,)
        return {**specs, **{f"{prefix}.self_attn.{name}": shape for name, shape in gated.items()}}


def _delta_net(config: DenseConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    d, extra = config.hidden_size, config.extra
    keys = extra["linear_num_key_heads"] * extra["linear_key_head_dim"]
    heads, head = extra["linear_num_value_heads"], extra["linear_value_head_dim"]
    channels = 2 * keys + heads * head
    shapes: dict[str, tuple[int, ...]] = {
        "conv1d.weight": (channels, 1, extra["linear_conv_kernel_dim"]),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "norm.weight": (head,),
        "out_proj.weight": (d, heads * head),
        "in_proj_qkv.weight": (channels, d),
        "in_proj_z.weight": (heads * head, d),
        "in_proj_b.weight": (heads, d),
        "in_proj_a.weight": (heads, d),
    }
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}
