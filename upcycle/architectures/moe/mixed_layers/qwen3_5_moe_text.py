"""Qwen3.5-MoE's text model: gated attention between linear attention layers, softmax routing, a gated shared expert."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.softmax.qwen2_moe import Qwen2Moe, shared_size
from upcycle.ffn.moe_shape import MoeShape


class Qwen35MoeText(Qwen2Moe):
    """Has Qwen2-MoE's block, with weights that are always normalised. Every layer is a MoE layer."""

    name = "qwen3_5_moe_text"
    title = "Qwen3.5-MoE (text)"
    architecture = "Qwen3_5MoeForCausalLM"
    holds = frozenset({Feature.GATED_ATTENTION, Feature.ATTENTION_BIAS, Feature.SHARED_EXPERTS})
    router_semantics = "top-k of softmax, normalised to sum 1; shared expert times sigmoid"

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; those of linear attention are the dense model's."""
        return {
            "moe_intermediate_size": shape.expert_size,
            "shared_expert_intermediate_size": shared_size(dense, shape),
            "num_experts": shape.experts,
            "attention_bias": dense.qkv_bias,
        }
