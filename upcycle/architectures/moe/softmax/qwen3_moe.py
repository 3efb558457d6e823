"""Qwen3-MoE: Qwen3's block with routed experts, dense layers where wanted, no shared expert."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor, Target, expert_tensors, router_tensor
from upcycle.ffn.moe_shape import MoeShape


class Qwen3Moe(Target):
    """Routes by a softmax and top-k, normalised by a flag that is off by default and must be on (error 1.75 on the logits without)."""

    name = "qwen3_moe"
    title = "Qwen3-MoE"
    architecture = "Qwen3MoeForCausalLM"
    holds = frozenset(
        {Feature.QUERY_NORMS, Feature.ATTENTION_BIAS, Feature.WINDOW, Feature.DENSE_FIRST, Feature.DENSE_LAYERS}
    )
    holds_unnormalized = True
    router_semantics = "top-k of softmax, normalised to sum 1 (norm_topk_prob)"

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys, with one ``sliding_window`` for all layers or none."""
        return {
            "intermediate_size": dense.intermediate_size,
            "moe_intermediate_size": shape.expert_size,
            "num_experts": shape.experts,
            "norm_topk_prob": shape.normalized,
            "attention_bias": dense.qkv_bias,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(dense.num_hidden_layers) if i not in shape.moe_layers],
            "use_sliding_window": dense.windows[0] is not None,
            "sliding_window": dense.windows[0],
        }

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router, then the routed experts."""
        prefix = self.module_paths.block_of(layer)
        router = router_tensor(f"{prefix}.gate.weight", dense, shape)
        names = ("gate_proj", "up_proj", "down_proj")
        return [router, *expert_tensors(f"{prefix}.experts", names, dense, shape, layout)]
