"""Nemotron-4 and Minitron: LayerNorms of ``1 + w``, partial rotary embeddings, an FFN without a gate (squared ReLU)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig
from upcycle.architectures.dense.layer_norm.base import LayerNormFamily
from upcycle.architectures.tensor_origin import Origin
from upcycle.files.formats.settings import FLAG


class Nemotron(LayerNormFamily):
    """Describes Nemotron: norms apply ``1 + w`` and are written so in fp32, where the sum does not round."""

    name, title = "nemotron", "Nemotron-4, Minitron"
    ffn_modules = {"up": "mlp.up_proj", "down": "mlp.down_proj"}
    aliases = {"rms_norm_eps": "norm_eps"}
    partial_rotary_factor = 0.5
    defaults = {
        "vocab_size": 256000,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 32,
        "num_attention_heads": 48,
        "num_key_value_heads": None,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "initializer_range": 0.0134,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    keys = {"attention_bias": FLAG, "mlp_bias": FLAG}
    token_defaults = {"bos_token_id": 2, "eos_token_id": 3}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases: ``attention_bias`` puts one on all four projections."""
        bias = bool(raw.get("attention_bias"))
        found = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(raw.get("mlp_bias"))}
        return {**super().details(raw, values), **found}

    def origin(self, config: DenseConfig, name: str) -> Origin:
        """Return where a tensor comes from; to a norm's weight, 1 is added."""
        return Origin(name, add=1.0) if name.endswith("norm.weight") else super().origin(config, name)
