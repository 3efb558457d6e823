"""Seed-OSS: Llama's block with separate flags for the biases on q, k and v and on the output projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import Family, Feature
from upcycle.files.formats.settings import FLAG


class SeedOss(Family):
    """Describes Seed-OSS: biases on q, k and v by default, none on the output projection."""

    name = "seed_oss"
    title = "Seed-OSS"
    targets = ("qwen2_moe", "glm4_moe", "solar_open", "granitemoe", "granitemoeshared", "gpt_oss")
    elsewhere = {
        Feature.OUTPUT_BIAS: "no stock architecture has that bias without the others",
    }
    defaults = {
        "vocab_size": 155136,
        "hidden_size": 4096,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 524288,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "attention_dropout": 0.1,
        "tie_word_embeddings": False,
    }
    keys = {"attention_bias": FLAG, "attention_out_bias": FLAG, "mlp_bias": FLAG}
    token_defaults = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases, by three flags. ``residual_dropout`` is for training, and no target has it."""
        return {
            "qkv_bias": bool(raw.get("attention_bias", True)),
            "output_bias": bool(raw.get("attention_out_bias", False)),
            "mlp_bias": bool(raw.get("mlp_bias", False)),
        }
