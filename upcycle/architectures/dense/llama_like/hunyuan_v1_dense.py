"""Hunyuan dense (0.5B to 7B): Llama's block with norms on queries and keys after the rotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.files.formats.settings import FLAG


class HunyuanV1Dense(Family):
    """Describes Hunyuan dense: here and in its MoE relative alone, a ``dynamic`` rope with ``alpha`` is static."""

    name = "hunyuan_v1_dense"
    title = "Hunyuan dense"
    targets = ("hunyuan_v1_moe",)
    defaults = {**Family.defaults, "vocab_size": 290943, "rms_norm_eps": 1e-05}
    keys = {"attention_bias": FLAG}
    token_defaults = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases: ``attention_bias`` puts one on all four projections."""
        bias = bool(raw.get("attention_bias"))
        return {"qkv_bias": bias, "output_bias": bias, "special": frozenset({Feature.ROTATED_QUERY_NORMS})}

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return Llama's layer with two more norms, as long as one head."""
        prefix = f"{self.module_paths.layer(layer)}.self_attn"
        norms = {f"{prefix}.{part}_layernorm.weight": (config.head_dim,) for part in ("query", "key")}
        return {**super().layer_specs(config, layer), **norms}
