"""Granite-MoE: Llama's block with multipliers, biases on all attention projections by flag, and fused experts on disk."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.module_paths import ModulePaths
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor, Target, expert_tensors
from upcycle.ffn.moe_shape import MoeShape, Part


class GraniteMoe(Target):
    """Routes by the top-k of the logits and a softmax over those, which equals a normalised top-k of the softmax.

    All four multipliers are written. ``attention_multiplier`` is 1 by default, where every other family means one over the
    square root of the head size; ``logits_scaling`` divides.
    """

    name = "granitemoe"
    title = "Granite-MoE"
    architecture = "GraniteMoeForCausalLM"
    holds = frozenset({Feature.PLAIN_QUERIES, Feature.ATTENTION_BIAS, Feature.MULTIPLIERS, Feature.LOGIT_SCALE})
    router_semantics = "softmax of the top-k logits"
    module_paths = ModulePaths(blocks=("block_sparse_moe",))
    router = "router"

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; ``intermediate_size`` is the width of one expert."""
        return {
            "intermediate_size": shape.expert_size,
            "num_local_experts": shape.experts,
            "attention_bias": dense.qkv_bias,
            "embedding_multiplier": dense.embedding_multiplier,
            "attention_multiplier": dense.attention_scale,
            "residual_multiplier": dense.residual_multiplier,
            "logits_scaling": 1.0 / dense.logits_multiplier,
        }

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router, and all experts in two tensors: this architecture stores them fused, under its own names."""
        prefix, fused = self.module_paths.block_of(layer), layout == "fused"
        experts = expert_tensors("experts", ("", "", ""), dense, shape, "fused")
        names = (
            ("experts.gate_up_proj", "experts.down_proj") if fused else ("input_linear.weight", "output_linear.weight")
        )
        router = f"{prefix}.router.weight" if fused else f"{prefix}.router.layer.weight"
        return [
            OutputTensor(router, (shape.experts, dense.hidden_size), (Part("router"),)),
            *(OutputTensor(f"{prefix}.{name}", e.shape, e.parts) for name, e in zip(names, experts, strict=True)),
        ]
