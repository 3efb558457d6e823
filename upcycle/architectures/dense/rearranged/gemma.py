"""Gemma 1 and CodeGemma: Llama's block with embeddings times the square root of the width and norms of ``1 + w``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import RefusalError
from upcycle.files.formats.settings import FLAG, SIZE


class Gemma(Family):
    """Describes Gemma: norms apply ``1 + w``, and embeddings are multiplied by the square root of the hidden size.

    Norms are written as ``1 + w`` in fp32, where the sum does not round; a loader that casts them to bfloat16 rounds them. For
    targets without multipliers, the embeddings are written multiplied, also in fp32, and the tied head as it was. A loader
    that casts them rounds the products, as the dense model does when it runs in bfloat16.
    """

    name = "gemma"
    title = "Gemma 1"
    targets = ("granitemoe", "granitemoeshared", "mixtral", "qwen2_moe")
    defaults = {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    }
    keys = {"attention_bias": FLAG, "head_dim": SIZE, "use_bidirectional_attention": FLAG.optional}
    token_defaults = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}

    def values(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values; ``gelu`` means the tanh approximation, as the stock class reads it."""
        values = super().values(raw)
        return {**values, "hidden_act": "gelu_pytorch_tanh"} if values["hidden_act"] == "gelu" else values

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases: ``attention_bias`` puts one on all four projections.

        Raises:
            RefusalError: attention is bidirectional.
        """
        if raw.get("use_bidirectional_attention"):
            raise RefusalError("config.json: 'use_bidirectional_attention' is set, and every target here is causal")
        bias = bool(raw.get("attention_bias"))
        return {"qkv_bias": bias, "output_bias": bias, "embedding_multiplier": values["hidden_size"] ** 0.5}

    def origin(self, config: DenseConfig, name: str) -> Origin:
        """Return where a tensor comes from; to a norm, 1 is added."""
        return Origin(name, add=1.0) if name.endswith("norm.weight") else super().origin(config, name)
