"""Youtu-LLM: DeepSeek-V3's block without experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.rearranged.latent import LatentFamily
from upcycle.files.formats.settings import FLAG, SPREAD


class Youtu(LatentFamily):
    """Describes Youtu-LLM: rotated in pairs by default. The spread of new weights follows from the width."""

    name = "youtu"
    title = "Youtu-LLM"
    rope_interleave = True
    latent_defaults = {
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    }
    defaults = {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "initializer_range": None,
        "rms_norm_eps": 1e-06,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    }
    keys = {
        **LatentFamily.keys,
        "rope_interleave": FLAG,
        "initializer_range": SPREAD.optional,
        "embedding_initializer_range": SPREAD.optional,
    }
    token_defaults = {"bos_token_id": 128000, "eos_token_id": 128001}

    def values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values, with the spread that the stock class computes where none is given."""
        values = super().values(raw)
        spread = values["initializer_range"]
        return {**values, "initializer_range": 2 / (5 * values["hidden_size"]) ** 0.5 if spread is None else spread}
