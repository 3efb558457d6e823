"""StarCoder2: LayerNorms, biases on every projection, an FFN without a gate, sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.layer_norm.base import LayerNormFamily
from upcycle.files.formats.settings import FLAG, FRACTION, SIZE


class Starcoder2(LayerNormFamily):
    """Describes StarCoder2: ``use_bias`` puts a bias on all projections of attention and FFN."""

    name, title = "starcoder2", "StarCoder2"
    ffn_modules = {"up": "mlp.c_fc", "down": "mlp.c_proj"}
    aliases = {"rms_norm_eps": "norm_epsilon"}
    defaults = {
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "initializer_range": 0.018042,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
    }
    keys = {"use_bias": FLAG, "sliding_window": SIZE.optional, "embedding_dropout": FRACTION}
    token_defaults = {"bos_token_id": 50256, "eos_token_id": 50256}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases, by ``use_bias``."""
        bias = bool(raw.get("use_bias", True))
        return {**super().details(raw, values), "qkv_bias": bias, "output_bias": bias, "mlp_bias": bias}

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return the same window for every layer, or none."""
        return (raw.get("sliding_window"),) * layers
