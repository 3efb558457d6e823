"""Hunyuan-A13B: Hunyuan's attention (norms on queries and keys after the rotation), softmax routing, one shared expert."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.base import (
    ExpertLayout,
    OutputTensor,
    Target,
    expert_tensors,
    gated_tensors,
    router_tensor,
    shared_parts,
)
from upcycle.ffn.moe_shape import MoeShape


class HunyuanV1Moe(Target):
    """Routes by a softmax and top-k, always normalised.

    ``shared_mlp`` is mandatory, ungated, and exactly as wide as one routed expert. So shared experts are not held, and an idle
    one is written.
    """

    name = "hunyuan_v1_moe"
    title = "Hunyuan-MoE"
    architecture = "HunYuanMoEV1ForCausalLM"
    holds = frozenset({Feature.ROTATED_QUERY_NORMS, Feature.ATTENTION_BIAS})
    router_semantics = "top-k of softmax, normalised to sum 1"
    shared = "shared_mlp"

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; ``intermediate_size`` is the width of one expert, and of the shared one."""
        return {
            "intermediate_size": shape.expert_size,
            "num_experts": shape.experts,
            "moe_topk": shape.top_k,
            "attention_bias": dense.qkv_bias,
        }

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router, the idle shared expert, then the routed experts."""
        prefix, size = self.module_paths.block_of(layer), shape.expert_size
        return [
            router_tensor(f"{prefix}.gate.wg.weight", dense, shape),
            *gated_tensors(f"{prefix}.shared_mlp", shared_parts(shape, size), dense, size),
            *expert_tensors(f"{prefix}.experts", ("gate_proj", "up_proj", "down_proj"), dense, shape, layout),
        ]
