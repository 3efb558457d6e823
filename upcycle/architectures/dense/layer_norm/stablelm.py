"""StableLM 3B and StableLM 2 1.6B: Llama's block with LayerNorms and partial rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.layer_norm.base import LayerNormFamily
from upcycle.errors import RefusalError
from upcycle.files.formats.settings import FLAG, FRACTION


class StableLm(LayerNormFamily):
    """Describes StableLM: ``use_qkv_bias`` puts biases on q, k and v; a gated FFN without biases."""

    name, title = "stablelm", "StableLM"
    aliases = {"rms_norm_eps": "layer_norm_eps"}
    partial_rotary_factor = 0.25
    must_divide = True
    defaults = {
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    keys = {"use_qkv_bias": FLAG, "qk_layernorm": FLAG, "use_parallel_residual": FLAG, "hidden_dropout": FRACTION}
    token_defaults = {"bos_token_id": 0, "eos_token_id": 0}

    def _refuse_unheld(self, raw: Mapping[str, Any], where: str) -> None:
        super()._refuse_unheld(raw, where)
        if raw.get("qk_layernorm"):
            raise RefusalError(
                f"{where}: 'qk_layernorm' is true: queries and keys have a LayerNorm per head, and no stock MoE architecture "
                "converted here has that"
            )

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases, by ``use_qkv_bias``."""
        return {**super().details(raw, values), "qkv_bias": bool(raw.get("use_qkv_bias"))}
