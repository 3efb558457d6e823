"""GLM-4.5-MoE: partial rotary attention, query and key norms by flag, sigmoid routing, a shared expert."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.sigmoid.base import SigmoidTarget
from upcycle.ffn.moe_shape import MoeShape


class Glm4Moe(SigmoidTarget):
    """Holds partial rotary embeddings as they are. Biases are on q, k and v, never on the output projection."""

    name = "glm4_moe"
    title = "GLM-4.5-MoE"
    architecture = "Glm4MoeForCausalLM"
    holds = frozenset(
        {
            Feature.PLAIN_QUERIES,
            Feature.QUERY_NORMS,
            Feature.QKV_BIAS,
            Feature.PARTIAL_ROTARY,
            Feature.SHARED_EXPERTS,
            Feature.DENSE_FIRST,
        }
    )

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys: ``partial_rotary_factor`` (default 0.5) where the class reads it first, no multi-token prediction."""
        factor = dense.rope_parameters.get("partial_rotary_factor", 1.0)
        return {
            **super().config(dense, shape),
            "intermediate_size": dense.intermediate_size,
            "first_k_dense_replace": min(shape.moe_layers),
            "use_qk_norm": dense.query_norms,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {**dense.rope_parameters, "partial_rotary_factor": factor},
            "partial_rotary_factor": factor,
        }
