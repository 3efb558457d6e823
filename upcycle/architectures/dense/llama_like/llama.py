"""Llama 1 to 3.x, SmolLM 1 and 2, TinyLlama, Yi, and every other checkpoint with ``model_type: llama``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.errors import CheckpointError
from upcycle.files.formats.settings import FLAG


class Llama(Family):
    """Describes Llama: RMSNorm, rotary attention, SwiGLU. Mixtral is the same block with a router."""

    name = "llama"
    title = "Llama"
    targets: tuple[str, ...] = (
        "mixtral",
        "qwen2_moe",
        "granitemoe",
        "granitemoeshared",
        "glm4_moe",
        "solar_open",
        "ernie4_5_moe",
        "gpt_oss",
    )
    keys = {"attention_bias": FLAG, "mlp_bias": FLAG}
    token_defaults = {"bos_token_id": 1, "eos_token_id": 2}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases: ``attention_bias`` puts one on all four projections."""
        bias = bool(raw.get("attention_bias"))
        return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(raw.get("mlp_bias"))}

    def _check_together(self, config: DenseConfig, raw: Mapping[str, Any], where: str) -> None:
        """Refuse a stream that the heads do not divide, as the stock class does even where ``head_dim`` is given.

        Raises:
            CheckpointError: as the base class, and for that.
        """
        super()._check_together(config, raw, where)
        if config.hidden_size % config.num_attention_heads:
            raise CheckpointError(
                f"{where}: 'hidden_size' {config.hidden_size} is not a multiple of 'num_attention_heads' "
                f"{config.num_attention_heads}",
                hint="correct the key, or download config.json again",
            )
