"""Granite 3 and 4 dense: Llama's block with multipliers on embeddings, attention scores, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import Family, Feature
from upcycle.files.formats.settings import FLAG, NUMBER, POSITIVE

MULTIPLIERS = {
    "attention_multiplier": NUMBER,
    "embedding_multiplier": POSITIVE,
    "logits_scaling": POSITIVE,
    "residual_multiplier": POSITIVE,
}


class Granite(Family):
    """Describes Granite: all four multipliers default to 1, even the one on attention scores; ``logits_scaling`` divides."""

    name = "granite"
    title = "Granite 3"
    targets: tuple[str, ...] = ("granitemoe", "granitemoeshared")
    elsewhere = {Feature.MLP_BIAS: "no stock architecture with multipliers has biases in its experts"}
    keys = {"attention_bias": FLAG, "mlp_bias": FLAG, **MULTIPLIERS}
    token_defaults = {"bos_token_id": 1, "eos_token_id": 2}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases: ``attention_bias`` puts one on all four projections."""
        bias = bool(raw.get("attention_bias"))
        return {
            "qkv_bias": bias,
            "output_bias": bias,
            "mlp_bias": bool(raw.get("mlp_bias")),
            "embedding_multiplier": raw.get("embedding_multiplier", 1.0),
            "attention_multiplier": raw.get("attention_multiplier", 1.0),
            "residual_multiplier": raw.get("residual_multiplier", 1.0),
            "logits_multiplier": 1.0 / raw.get("logits_scaling", 1.0),
        }
