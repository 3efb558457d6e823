"""Helium: Llama's block, rotated in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import Family
from upcycle.errors import RefusalError
from upcycle.files.formats.settings import FLAG, SIZE


class Helium(Family):
    """Describes Helium: ``attention_bias`` means q, k and v only, and all heads together must be as wide as the stream."""

    name = "helium"
    title = "Helium"
    targets = ("mixtral", "qwen2_moe", "ernie4_5_moe", "gpt_oss")
    rotates_pairs = True
    rope_theta = 100000.0
    defaults = {
        "vocab_size": 48000,
        "hidden_size": 2560,
        "intermediate_size": 7040,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-08,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
    }
    keys = {"attention_bias": FLAG, "mlp_bias": FLAG, "head_dim": SIZE}
    token_defaults = {"pad_token_id": 3, "eos_token_id": 2, "bos_token_id": 1}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases, by ``attention_bias``.

        Raises:
            RefusalError: the stock class cannot run these sizes.
        """
        heads, head, width = (values[key] for key in ("num_attention_heads", "head_dim", "hidden_size"))
        if heads * (head or width // heads) != width:
            raise RefusalError(
                f"config.json: 'num_attention_heads' {heads} times 'head_dim' {head} is not 'hidden_size' {width}"
            )
        return {"qkv_bias": bool(raw.get("attention_bias")), "mlp_bias": bool(raw.get("mlp_bias"))}
