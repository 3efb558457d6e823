"""dots.llm1: Qwen3's attention, sigmoid routing, a shared expert."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.sigmoid.base import SigmoidTarget
from upcycle.ffn.moe_shape import MoeShape


class Dots1(SigmoidTarget):
    """Holds what Qwen3-MoE cannot: shared experts, and sliding windows on some layers."""

    name = "dots1"
    title = "dots.llm1"
    architecture = "Dots1ForCausalLM"
    holds = frozenset(
        {
            Feature.QUERY_NORMS,
            Feature.ATTENTION_BIAS,
            Feature.WINDOW,
            Feature.MIXED_WINDOWS,
            Feature.SHARED_EXPERTS,
            Feature.DENSE_FIRST,
        }
    )

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; ``layer_types`` is written out, as its default differs from the dense family's."""
        return {
            **super().config(dense, shape),
            "intermediate_size": dense.intermediate_size,
            "first_k_dense_replace": min(shape.moe_layers),
            "sliding_window": dense.window,
            "max_window_layers": dense.num_hidden_layers,
            "layer_types": dense.layer_types,
        }
