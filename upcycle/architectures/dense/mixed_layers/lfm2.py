"""LFM2: short convolutions and attention in turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.module_paths import ModulePaths
from upcycle.files.formats.settings import COUNTS, FLAG, NAMES, POSITIVE, SIZE


class Lfm2(Family):
    """Describes LFM2: its names are those of its MoE relative, and the one called the embedding's norm is the final norm."""

    name = "lfm2"
    title = "LFM2"
    targets = ("lfm2_moe",)
    module_paths = ModulePaths(final_norm="model.embedding_norm", blocks=("feed_forward",))
    aliases = {"rms_norm_eps": "norm_eps"}
    rope_theta = 1000000.0
    defaults = {
        "vocab_size": 65536,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    }
    keys = {
        "block_auto_adjust_ff_dim": FLAG,
        "block_ff_dim": SIZE,
        "block_ffn_dim_multiplier": POSITIVE,
        "block_multiple_of": SIZE,
        "conv_L_cache": SIZE,
        "conv_bias": FLAG,
        "full_attn_idxs": COUNTS.optional,
        "layer_types": NAMES.optional,
        "tie_embedding": FLAG,
    }
    layer_kinds = ("full_attention", "conv")
    token_defaults = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values; the FFN's width is ``block_ff_dim`` or ``intermediate_size``, adjusted where the keys say so."""
        values = super().values(raw)
        width = raw.get("block_ff_dim", values["intermediate_size"])
        if raw.get("block_auto_adjust_ff_dim", True):
            multiple = raw.get("block_multiple_of", 256)
            width = int(raw.get("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
            width = -(-width // multiple) * multiple
        tied = raw.get("tie_embedding", values["tie_word_embeddings"])
        return {**values, "intermediate_size": width, "tie_word_embeddings": tied}

    def narrowed(self, raw: Mapping[str, Any], width: int) -> dict[str, Any]:
        """Return the configuration with the width under both of its names, and no rule that would adjust it."""
        config = super().narrowed(raw, width)
        return {**config, "block_ff_dim": width, "block_auto_adjust_ff_dim": False}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return which layers attend, and the convolutions' keys."""
        layers = range(values["num_hidden_layers"])
        attend = raw.get("full_attn_idxs")
        kinds = raw.get("layer_types") or [
            "full_attention" if attend is None or layer in attend else "conv" for layer in layers
        ]
        extra = {
            "layer_types": kinds,
            "conv_bias": bool(raw.get("conv_bias", False)),
            "conv_L_cache": raw.get("conv_L_cache", 3),
        }
        return {"special": frozenset({Feature.CONVOLUTIONS}), "extra": extra}

    def ffn_names(self, layer: int) -> dict[str, str]:
        """Return the names; gate, up and down are called w1, w3 and w2, as in Mixtral's experts."""
        block = self.module_paths.block_of(layer)
        names = {"gate": "w1", "up": "w3", "down": "w2"}
        tensors = {part: f"{block}.{name}.weight" for part, name in names.items()}
        return {**tensors, "norm": f"{self.module_paths.layer(layer)}.ffn_norm.weight"}

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the tensors of attention with norms on queries and keys, or of a convolution between two projections."""
        d, head = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
        shapes: dict[str, tuple[int, ...]] = {"operator_norm.weight": (d,), "ffn_norm.weight": (d,)}
        if config.extra["layer_types"][layer] == "conv":
            kernel = config.extra["conv_L_cache"]
            convolution = {"conv": (d, 1, kernel), "in_proj": (3 * d, d), "out_proj": (d, d)}
            for name, shape in convolution.items():
                shapes[f"conv.{name}.weight"] = shape
                if config.extra["conv_bias"]:
                    shapes[f"conv.{name}.bias"] = shape[:1]
        else:
            for part, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"self_attn.{part}_proj.weight"] = (rows, d)
            shapes["self_attn.out_proj.weight"] = (d, q)
            shapes |= {"self_attn.q_layernorm.weight": (head,), "self_attn.k_layernorm.weight": (head,)}
        return {f"{self.module_paths.layer(layer)}.{name}": shape for name, shape in shapes.items()}
