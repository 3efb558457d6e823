"""LFM2-MoE: short convolutions and attention in turn, sigmoid routing, no shared expert."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.module_paths import ModulePaths
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor, Target, expert_tensors, router_tensor
from upcycle.ffn.moe_shape import MoeShape, Part


class Lfm2Moe(Target):
    """Routes by the top-k of ``sigmoid(logits) + bias``, with weights normalised by flag, times ``routed_scaling_factor`` (1).

    The normaliser adds 1e-6 to the sum of the chosen scores, so that the weights add up to ``1 - 1e-6 / sum``: a relative error
    of 1e-6 at scores of a half, which nothing can make up for.
    """

    name = "lfm2_moe"
    title = "LFM2-MoE"
    architecture = "Lfm2MoeForCausalLM"
    holds = frozenset({Feature.CONVOLUTIONS, Feature.DENSE_FIRST})
    router_semantics = "top-k of sigmoid, normalised to sum 1 (norm_topk_prob)"
    module_paths = ModulePaths(final_norm="model.embedding_norm", blocks=("feed_forward",))
    score = "sigmoid"

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; the convolutions' keys are the dense model's."""
        return {
            "intermediate_size": dense.intermediate_size,
            "moe_intermediate_size": shape.expert_size,
            "num_experts": shape.experts,
            "num_dense_layers": min(shape.moe_layers),
            "norm_eps": dense.rms_norm_eps,
            "norm_topk_prob": True,
            "use_expert_bias": True,
            "routed_scaling_factor": 1.0,
        }

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router and its bias, then w1 (gate), w3 (up) and w2 (down) of each expert."""
        prefix = self.module_paths.block_of(layer)
        zeros = (Part("zeros", size=shape.experts),)
        return [
            router_tensor(f"{prefix}.gate.weight", dense, shape),
            OutputTensor(f"{prefix}.expert_bias", (shape.experts,), zeros, dtype="float32"),
            *expert_tensors(f"{prefix}.experts", ("w1", "w3", "w2"), dense, shape, layout),
        ]
