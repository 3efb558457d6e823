"""InternLM 3: Llama's block with other defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig
from upcycle.architectures.dense.llama_like.llama import Llama
from upcycle.errors import CheckpointError


class InternLm3(Llama):
    """Describes InternLM 3: as Llama, biases are on all projections or on none, by two flags that must agree.

    ``qkv_bias`` and ``bias`` are older names of the flags, which the stock class prefers where both are given.
    """

    name = "internlm3"
    title = "InternLM 3"
    targets = ("mixtral", "qwen2_moe", "gpt_oss")
    defaults = {
        **Llama.defaults,
        "vocab_size": 128512,
        "intermediate_size": 10240,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05,
    }
    token_defaults = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}

    def config(self, raw: Mapping[str, Any], where: str = "config.json") -> DenseConfig:
        """Read the configuration, with the older names of its flags."""
        newer = {"qkv_bias": "attention_bias", "bias": "mlp_bias"}
        return super().config({**raw, **{newer[key]: value for key, value in raw.items() if key in newer}}, where)

    def _check_together(self, config: DenseConfig, raw: Mapping[str, Any], where: str) -> None:
        """Refuse biases on some projections alone, as the stock class does.

        Raises:
            CheckpointError: as the base class, and for that.
        """
        super()._check_together(config, raw, where)
        if config.qkv_bias != config.mlp_bias:
            raise CheckpointError(
                f"{where}: 'attention_bias' (or 'qkv_bias') is {config.qkv_bias}, 'mlp_bias' (or 'bias') {config.mlp_bias}",
                hint="correct the keys, or download config.json again",
            )
