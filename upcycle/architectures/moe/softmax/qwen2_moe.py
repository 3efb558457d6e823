"""Qwen2-MoE: q/k/v biases by flag, one gated shared expert, dense layers where wanted."""

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

# A Qwen2-MoE block always has a shared expert. Where none is wanted, it gets so few neurons and a zero down projection: it
# adds nothing, and unlike with zero gate and up rows, it can still learn.
_IDLE_SHARED_SIZE = 64


class Qwen2Moe(Target):
    """Routes by a softmax and top-k, normalised by a flag that is off by default, and adds ``sigmoid(w x) * shared(x)``.

    The switch ``w`` of the shared expert is written so small (between 2^-60 and 2^-59) that its sigmoid is 1/2 for every token,
    to the last bit, and the shared expert's down projection is doubled to make up for it. It is not zero, since llama.cpp divides
    by ``w x``; float16 cannot hold it, so that it is stored in float32 beside experts in float16.
    """

    name = "qwen2_moe"
    title = "Qwen2-MoE"
    architecture = "Qwen2MoeForCausalLM"
    holds = frozenset(
        {
            Feature.PLAIN_QUERIES,
            Feature.QKV_BIAS,
            Feature.WINDOW,
            Feature.MIXED_WINDOWS,
            Feature.SHARED_EXPERTS,
            Feature.DENSE_FIRST,
            Feature.DENSE_LAYERS,
        }
    )
    holds_unnormalized = True
    shared, shared_switch = "shared_expert", "shared_expert_gate"
    router_semantics = "top-k of softmax, normalised to sum 1 (norm_topk_prob); shared expert times sigmoid"
    masks_rotary = True

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; ``layer_types`` is written out, as its default differs from the dense family's."""
        return {
            "intermediate_size": dense.intermediate_size,
            "moe_intermediate_size": shape.expert_size,
            "shared_expert_intermediate_size": shared_size(dense, shape),
            "num_experts": shape.experts,
            "norm_topk_prob": shape.normalized,
            "qkv_bias": dense.qkv_bias,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(dense.num_hidden_layers) if i not in shape.moe_layers],
            "use_sliding_window": dense.window is not None,
            "sliding_window": dense.window,
            "max_window_layers": dense.num_hidden_layers,
            "layer_types": dense.layer_types,
        }

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router, the shared gate, the shared expert, then the routed experts."""
        prefix, d, size = self.module_paths.block_of(layer), dense.hidden_size, shared_size(dense, shape)
        return [
            router_tensor(f"{prefix}.gate.weight", dense, shape),
            OutputTensor(f"{prefix}.shared_expert_gate.weight", (1, d), (Part("shared_switch"),)),
            *gated_tensors(f"{prefix}.shared_expert", shared_parts(shape, size, factor=2.0), dense, size),
            *expert_tensors(f"{prefix}.experts", ("gate_proj", "up_proj", "down_proj"), dense, shape, layout),
        ]


def shared_size(dense: DenseConfig, shape: MoeShape) -> int:
    """Return the width of the shared expert, idle or not."""
    return shape.shared * shape.expert_size if shape.shared else min(_IDLE_SHARED_SIZE, dense.intermediate_size)
