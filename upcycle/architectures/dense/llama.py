"""Llama 1 to 3.x, SmolLM 1 and 2, TinyLlama, Yi, and every other checkpoint with ``model_type: llama``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import Family, Feature
from upcycle.files.formats.settings import FLAG


class Llama(Family):
    """RMSNorm, rotary attention, SwiGLU. Mixtral is the same block with a router."""

    name = "llama"
    title = "Llama"
    targets = ("mixtral", "qwen2_moe", "granitemoe", "granitemoeshared", "glm4_moe", "solar_open", "ernie4_5_moe")
    elsewhere = {
        Feature.MLP_BIAS: "no stock architecture has biases in SwiGLU experts",
    }
    defaults = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    keys = {"attention_bias": FLAG, "mlp_bias": FLAG}
    token_defaults = {"bos_token_id": 1, "eos_token_id": 2}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """``attention_bias`` puts a bias on all four projections."""
        bias = bool(raw.get("attention_bias"))
        return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(raw.get("mlp_bias"))}
