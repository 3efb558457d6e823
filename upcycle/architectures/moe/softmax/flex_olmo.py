"""FlexOlmo: OLMo2's block (norms behind attention and FFN, query and key norms over all heads) with routed experts."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor, Target, expert_tensors, router_tensor
from upcycle.ffn.moe_shape import MoeShape


class FlexOlmo(Target):
    """Routes by a softmax and top-k, normalised by flag (off by default). The router reads the residual stream without a norm.

    The norm behind the experts cancels any factor common to all of them, but for its eps.
    """

    name = "flex_olmo"
    title = "FlexOlmo"
    architecture = "FlexOlmoForCausalLM"
    holds = frozenset({Feature.FULL_QUERY_NORMS, Feature.POST_NORMS, Feature.ATTENTION_BIAS})
    router_semantics = "top-k of softmax, normalised to sum 1 (norm_topk_prob)"

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; ``intermediate_size`` is the width of one expert."""
        return {
            "intermediate_size": shape.expert_size,
            "num_experts": shape.experts,
            "norm_topk_prob": True,
            "attention_bias": dense.qkv_bias,
        }

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router, then the routed experts."""
        prefix, names = self.module_paths.block_of(layer), ("gate_proj", "up_proj", "down_proj")
        router = router_tensor(f"{prefix}.gate.weight", dense, shape)
        return [router, *expert_tensors(f"{prefix}.experts", names, dense, shape, layout)]
