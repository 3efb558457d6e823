"""Qwen3: per-head norms on queries and keys, no biases unless asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import Family
from upcycle.architectures.dense.llama_like.qwen2 import WINDOW_KEYS, upper_layer_windows
from upcycle.files.formats.settings import FLAG, SIZE


class Qwen3(Family):
    """Describes Qwen3: query and key norms; ``attention_bias`` puts a bias on all four projections."""

    name = "qwen3"
    title = "Qwen3"
    targets: tuple[str, ...] = ("qwen3_moe", "mellum", "dots1", "glm4_moe")
    defaults = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    keys = {**WINDOW_KEYS, "attention_bias": FLAG, "head_dim": SIZE}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the norms on queries and keys, which are always there, and the biases, by ``attention_bias``."""
        bias = bool(raw.get("attention_bias"))
        return {"qkv_bias": bias, "output_bias": bias, "query_norms": True}

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return sliding windows on the upper layers, as in Qwen2."""
        return upper_layer_windows(raw, layers)
