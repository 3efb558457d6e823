"""ERNIE-4.5-MoE: Llama's block rotated in pairs, softmax routing with a bias on the choice, optional shared experts."""

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
from upcycle.ffn.moe_shape import MoeShape, Part


class Ernie45Moe(Target):
    """Routes by the top-k of ``softmax + bias``, with weights always normalised (their sum clamped at ``moe_norm_min``).

    Rows of q and k are put into pairs. ``use_bias`` would put biases on the experts too, so it stays off.
    """

    name = "ernie4_5_moe"
    title = "ERNIE-4.5-MoE"
    architecture = "Ernie4_5_MoeForCausalLM"
    holds = frozenset({Feature.PLAIN_QUERIES, Feature.SHARED_EXPERTS, Feature.DENSE_FIRST})
    router_semantics = "top-k of softmax, normalised to sum 1; shared experts ungated"
    rotates_pairs = True
    shared = "shared_experts"

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; dense layers come first, up to ``moe_layer_start_index``."""
        return {
            "intermediate_size": dense.intermediate_size,
            "moe_intermediate_size": shape.expert_size,
            "moe_num_experts": shape.experts,
            "moe_k": shape.top_k,
            "moe_num_shared_experts": shape.shared,
            "moe_layer_start_index": min(shape.moe_layers),
            "moe_layer_end_index": dense.num_hidden_layers - 1,
            "moe_layer_interval": 1,
            "moe_norm_min": 1e-12,
            "use_bias": False,
        }

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router and its bias, the shared experts where there are any, then the routed experts."""
        prefix, size = self.module_paths.block_of(layer), shape.shared * shape.expert_size
        shared = gated_tensors(f"{prefix}.shared_experts", shared_parts(shape, 0), dense, size) if shape.shared else []
        statics = f"{prefix}.gate.moe_statics" if layout == "fused" else f"{prefix}.moe_statics"
        zeros = (Part("zeros", size=shape.experts),)
        return [
            router_tensor(f"{prefix}.gate.weight", dense, shape),
            OutputTensor(f"{statics}.e_score_correction_bias", (1, shape.experts), zeros, dtype="float32"),
            *shared,
            *expert_tensors(f"{prefix}.experts", ("gate_proj", "up_proj", "down_proj"), dense, shape, layout),
        ]
