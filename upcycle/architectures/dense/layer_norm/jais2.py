"""Jais 2: Llama's attention behind LayerNorms, an FFN without a gate (squared ReLU), biases on every projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.layer_norm.base import LayerNormFamily
from upcycle.files.formats.settings import FLAG, SIZE


class Jais2(LayerNormFamily):
    """Describes Jais 2: ``attention_bias`` and ``mlp_bias`` are on unless the configuration says otherwise."""

    name, title = "jais2", "Jais 2"
    ffn_modules = {"up": "mlp.up_proj", "down": "mlp.down_proj"}
    aliases = {"rms_norm_eps": "layer_norm_eps"}
    defaults = {
        "vocab_size": 150272,
        "hidden_size": 3328,
        "intermediate_size": 26624,
        "num_hidden_layers": 32,
        "num_attention_heads": 26,
        "num_key_value_heads": None,
        "hidden_act": "relu2",
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    keys = {"attention_bias": FLAG, "mlp_bias": FLAG, "num_key_value_heads": SIZE.optional}
    token_defaults = {"bos_token_id": 0, "eos_token_id": 150024}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases."""
        bias = bool(raw.get("attention_bias", True))
        found = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", True))}
        return {**super().details(raw, values), **found}
