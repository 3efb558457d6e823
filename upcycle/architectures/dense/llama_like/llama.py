"""Llama 1 to 3.x, SmolLM 1 and 2, TinyLlama, Yi, and every other checkpoint with ``model_type: llama``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import Family
from upcycle.files.formats.settings import FLAG


class Llama(Family):
    """Describes Llama: RMSNorm, rotary attention, SwiGLU. Mixtral is the same block with a router."""

    name = "llama"
    title = "Llama"
    must_divide = True  # even where head_dim is given
    targets: tuple[str, ...] = (
        "mixtral",
        "qwen2_moe",
        "granitemoe",
        "granitemoeshared",
        "glm4_moe",
        "solar_open",
        "ernie4_5_moe",
        "gpt_oss",
    )
    keys = {"attention_bias": FLAG, "mlp_bias": FLAG}
    token_defaults = {"bos_token_id": 1, "eos_token_id": 2}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases: ``attention_bias`` puts one on all four projections."""
        bias = bool(raw.get("attention_bias"))
        return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(raw.get("mlp_bias"))}
