"""Mellum: Qwen3-MoE with sliding windows on any layers and a rotary embedding per kind of layer."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.softmax.qwen3_moe import Qwen3Moe
from upcycle.ffn.moe_shape import MoeShape


class Mellum(Qwen3Moe):
    """Has Qwen3-MoE's tensors; lists say which layers have a window, experts and which rope."""

    name = "mellum"
    title = "Mellum"
    architecture = "MellumForCausalLM"
    holds = Qwen3Moe.holds | {Feature.MIXED_WINDOWS}

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys, with the dense model's rope for both kinds of layers, whose defaults differ."""
        return {
            "intermediate_size": dense.intermediate_size,
            "moe_intermediate_size": shape.expert_size,
            "num_experts": shape.experts,
            "norm_topk_prob": True,
            "attention_bias": dense.qkv_bias,
            "sliding_window": dense.window,
            "layer_types": dense.layer_types,
            "mlp_layer_types": ["sparse" if i in shape.moe_layers else "dense" for i in range(dense.num_hidden_layers)],
            "num_nextn_predict_layers": None,
        }

    def full_config(self, dense: DenseConfig, shape: MoeShape, dtype: str) -> dict[str, Any]:
        """Return ``config.json`` without the older spelling of the rope: loaders that need it do not know this architecture."""
        config = super().full_config(dense, shape, dtype)
        rope = {kind: dict(dense.rope_parameters) for kind in ("full_attention", "sliding_attention")}
        return {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")} | {
            "rope_parameters": rope
        }
