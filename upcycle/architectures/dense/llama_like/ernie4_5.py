"""ERNIE 4.5 dense: Llama's block, rotated in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import Family
from upcycle.files.formats.settings import FLAG


class Ernie45(Family):
    """Describes ERNIE 4.5: ``use_bias`` puts biases on all projections, those of the FFN included."""

    name = "ernie4_5"
    title = "ERNIE 4.5"
    targets = ("ernie4_5_moe", "mixtral", "qwen2_moe", "gpt_oss")
    rotates_pairs = True
    rope_theta = 500000.0
    defaults = {
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    }
    keys = {"use_bias": FLAG.optional}
    token_defaults = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return all biases or none."""
        bias = bool(raw.get("use_bias"))
        return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bias}
