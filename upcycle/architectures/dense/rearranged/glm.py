"""GLM-4 9B and GLM-Edge (``model_type: glm``): Llama's block, half of each head rotated in pairs, gate and up in one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig
from upcycle.architectures.dense.rearranged.fused import FusedFamily
from upcycle.files.formats.settings import FLAG

_END = [151329, 151336, 151338]


class Glm(FusedFamily):
    """Describes GLM: biases on q, k and v by default, and a rotation of the first half of each head unless said otherwise."""

    name = "glm"
    title = "GLM-4 9B, GLM-Edge"
    targets = ("glm4_moe", "mixtral", "qwen2_moe")
    fused = {"gate_up_proj": ("gate_proj", "up_proj")}
    rotates_pairs = True
    partial_rotary_factor = 0.5
    defaults = {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": 0.02,
        "rms_norm_eps": 0.00000015625,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    keys = {"attention_bias": FLAG}
    token_defaults = {"eos_token_id": _END, "pad_token_id": 151329}

    def config(self, raw: Mapping[str, Any], where: str = "config.json") -> DenseConfig:
        """Read the configuration; an end token of null means the class's own."""
        return super().config(raw if raw.get("eos_token_id") is not None else {**raw, "eos_token_id": _END}, where)

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases, by ``attention_bias``: the output projection has none."""
        return {"qkv_bias": bool(raw.get("attention_bias", True))}
