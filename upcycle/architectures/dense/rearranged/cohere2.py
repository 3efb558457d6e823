"""Command R7B and Command A: attention and FFN side by side behind one LayerNorm, rotary only where there is a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.files.formats.settings import DECIMAL, FLAG, NAMES, SIZE


class Cohere2(Family):
    """Describes Cohere2: rotated in pairs, with logits times ``logit_scale``; the FFN has the same input as attention."""

    name = "cohere2"
    title = "Cohere2 (Command R7B, Command A)"
    targets = ("cohere2_moe",)
    rotates_pairs = True
    aliases = {"rms_norm_eps": "layer_norm_eps"}
    defaults = {
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    }
    keys = {
        "attention_bias": FLAG,
        "layer_types": NAMES.optional,
        "logit_scale": DECIMAL,
        "sliding_window": SIZE.optional,
        "sliding_window_pattern": SIZE,
    }
    token_defaults = {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 255001}

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return the windows by ``layer_types``; without it, on every layer but each ``sliding_window_pattern``-th."""
        window, pattern = raw.get("sliding_window", 4096), raw.get("sliding_window_pattern", 4)
        kinds = raw.get("layer_types") or [
            "sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)
        ]
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def thetas(self, raw: Mapping[str, Any], layers: int, theta: float) -> tuple[float, ...]:
        """Return theta 0 for the layers without a window, which are not rotated."""
        return tuple(0 if window is None else theta for window in self.windows(raw, layers))

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases: ``attention_bias`` puts one on all four projections."""
        bias = bool(raw.get("attention_bias"))
        scale = raw.get("logit_scale", 0.0625)
        return {
            "qkv_bias": bias,
            "output_bias": bias,
            "logits_multiplier": scale,
            "special": frozenset({Feature.PARALLEL_BLOCK}),
        }

    def ffn_names(self, layer: int) -> dict[str, str]:
        """Return Llama's names; the input norm is the layer's only one."""
        return {**super().ffn_names(layer), "norm": f"{self.module_paths.layer(layer)}.input_layernorm.weight"}

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return Llama's layer without its second norm."""
        specs = super().layer_specs(config, layer)
        del specs[f"{self.module_paths.layer(layer)}.post_attention_layernorm.weight"]
        return specs
