"""MiniCPM 3: latent attention, with multipliers on embeddings, residuals and logits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import Feature
from upcycle.architectures.dense.rearranged.latent import LatentFamily
from upcycle.files.formats.settings import FLAG, POSITIVE, SIZE


class MiniCpm3(LatentFamily):
    """Describes MiniCPM 3: blocks add ``scale_depth / sqrt(layers)`` times their output, logits are divided by
    ``hidden_size / dim_model_base``; null means neither.
    """

    name = "minicpm3"
    title = "MiniCPM 3"
    must_divide = True  # even where head_dim is given
    elsewhere = {Feature.MLP_BIAS: "no stock architecture with latent attention has biases in its experts"}
    latent_defaults = {
        "kv_lora_rank": 256,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": None,
    }
    defaults = {
        "vocab_size": 73448,
        "hidden_size": 2560,
        "intermediate_size": 6400,
        "num_hidden_layers": 62,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.1,
        "rms_norm_eps": 1e-05,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    }
    keys = {
        **LatentFamily.keys,
        "v_head_dim": SIZE.optional,
        "mlp_bias": FLAG,
        "scale_emb": POSITIVE,
        "scale_depth": POSITIVE.optional,
        "dim_model_base": SIZE.optional,
    }
    token_defaults = {"bos_token_id": 1, "eos_token_id": 2}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the multipliers, too."""
        depth, base = raw.get("scale_depth", 1.4), raw.get("dim_model_base", 256)
        return {
            **super().details(raw, values),
            "mlp_bias": bool(raw.get("mlp_bias")),
            "embedding_multiplier": raw.get("scale_emb", 12),
            "residual_multiplier": 1.0 if depth is None else depth / math.sqrt(values["num_hidden_layers"]),
            "logits_multiplier": 1.0 if base is None else base / values["hidden_size"],
        }
