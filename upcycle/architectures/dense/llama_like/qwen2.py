"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v, and sliding windows on the upper layers when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import Family
from upcycle.files.formats.settings import COUNT, FLAG, NAMES, SIZE

WINDOW_KEYS = {
    "layer_types": NAMES.optional,
    "max_window_layers": COUNT,
    "sliding_window": SIZE.optional,
    "use_sliding_window": FLAG,
}


class Qwen2(Family):
    """Describes Qwen2: q, k and v always have biases; the output projection has none."""

    name = "qwen2"
    title = "Qwen2, Qwen2.5"
    targets: tuple[str, ...] = ("qwen2_moe", "glm4_moe", "solar_open")
    defaults = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "head_dim": None,
    }
    keys = WINDOW_KEYS

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases on q, k and v, which no key of this family turns off."""
        return {"qkv_bias": True}

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return the windows by ``layer_types``; without it, on the layers from ``max_window_layers`` on."""
        return upper_layer_windows(raw, layers)


def upper_layer_windows(raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Return the sliding windows as Qwen2's and Qwen3's configuration classes place them (transformers 5)."""
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or [
        "sliding_attention" if window is not None and layer >= first else "full_attention" for layer in range(layers)
    ]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
