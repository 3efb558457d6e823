"""DeepSeek-V3: multi-head latent attention, sigmoid routing, a shared expert."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.sigmoid.base import SigmoidTarget
from upcycle.ffn.moe_shape import MoeShape


class DeepseekV3(SigmoidTarget):
    """Holds latent attention, rotated in pairs or (``rope_interleave`` false) in halves. No layers predict several tokens."""

    name = "deepseek_v3"
    title = "DeepSeek-V3"
    architecture = "DeepseekV3ForCausalLM"
    holds = frozenset({Feature.LATENT_ATTENTION, Feature.ATTENTION_BIAS, Feature.SHARED_EXPERTS, Feature.DENSE_FIRST})

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; the sizes of its attention are the dense model's."""
        return {
            **super().config(dense, shape),
            "intermediate_size": dense.intermediate_size,
            "first_k_dense_replace": min(shape.moe_layers),
            "num_nextn_predict_layers": 0,
        }
