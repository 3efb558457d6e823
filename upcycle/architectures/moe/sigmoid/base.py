"""The base of targets with DeepSeek-V3's router: sigmoid scores, a bias on the choice, an ungated shared expert."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig
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


class SigmoidTarget(Target):
    """Routes by the top-k of ``sigmoid(logits) + bias``, with weights normalised by flag, times ``routed_scaling_factor``.

    The flag is written as on, the factor as 1, the bias (fp32, without gradients) as zeros, and one group. The normaliser adds
    1e-20 to the sum, which changes no fp32 number. Equal logits give equal weights, and two weights differ by less than under
    a softmax: ``sigmoid(a) / sigmoid(b) <= exp(a - b)`` for ``a >= b``.

    The shared expert is mandatory, ungated, and as wide as a whole number of routed ones: an idle one takes the memory and the
    time of a routed one.
    """

    router_semantics = "top-k of sigmoid, normalised to sum 1 (norm_topk_prob); shared experts ungated"
    score = "sigmoid"
    shared = "shared_experts"

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys, with all of the router's: none is left to its default."""
        return {
            "moe_intermediate_size": shape.expert_size,
            "n_routed_experts": shape.experts,
            "n_shared_experts": max(1, shape.shared),
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
            "attention_bias": dense.qkv_bias,
        }

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router and its bias, the shared expert, then the routed experts."""
        prefix, experts = self.module_paths.block_of(layer), shape.experts
        zeros = (Part("zeros", size=experts),)
        size = max(1, shape.shared) * shape.expert_size
        return [
            router_tensor(f"{prefix}.gate.weight", dense, shape),
            OutputTensor(f"{prefix}.gate.e_score_correction_bias", (experts,), zeros, dtype="float32"),
            *gated_tensors(f"{prefix}.shared_experts", shared_parts(shape, size), dense, size),
            *expert_tensors(f"{prefix}.experts", ("gate_proj", "up_proj", "down_proj"), dense, shape, layout),
        ]
