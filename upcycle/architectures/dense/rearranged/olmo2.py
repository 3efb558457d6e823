"""OLMo 2: norms behind attention and FFN instead of before them, query and key norms over all heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.module_paths import ModulePaths
from upcycle.files.formats.settings import FLAG


class Olmo2(Family):
    """Describes OLMo 2: the FFN, and so a router, reads the residual stream without a norm."""

    name = "olmo2"
    title = "OLMo 2"
    targets = ("flex_olmo",)
    module_paths = ModulePaths(output_norm="post_feedforward_layernorm")
    defaults = {**Family.defaults, "vocab_size": 50304, "rms_norm_eps": 1e-05}
    keys = {"attention_bias": FLAG}
    token_defaults = {"pad_token_id": 1, "eos_token_id": 50279}

    def details(self, raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases: ``attention_bias`` puts one on all four projections."""
        bias = bool(raw.get("attention_bias"))
        special = frozenset({Feature.POST_NORMS, Feature.FULL_QUERY_NORMS})
        return {"qkv_bias": bias, "output_bias": bias, "special": special}

    def ffn_names(self, layer: int) -> dict[str, str]:
        """Return the names of gate, up and down alone: there is no norm before the FFN."""
        return {part: name for part, name in super().ffn_names(layer).items() if part != "norm"}

    def layer_specs(self, config: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return Llama's layer with both norms behind their blocks, and norms over all heads of queries and keys."""
        specs, prefix = super().layer_specs(config, layer), self.module_paths.layer(layer)
        del specs[f"{prefix}.input_layernorm.weight"]
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            specs[f"{prefix}.self_attn.{part}_norm.weight"] = (heads * config.head_dim,)
        return {**specs, f"{prefix}.post_feedforward_layernorm.weight": (config.hidden_size,)}

    def norms_below(self, layer: int) -> list[str]:
        """Return the norms behind attention and FFN of every layer below, and behind this layer's attention."""
        at = self.module_paths.layer
        below = [f"{at(i)}.post_{part}_layernorm.weight" for i in range(layer) for part in _ADDED]
        return [*below, f"{at(layer)}.post_attention_layernorm.weight"]


_ADDED = ("attention", "feedforward")
