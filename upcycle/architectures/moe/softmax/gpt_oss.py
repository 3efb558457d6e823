"""GPT-OSS: Llama's block with biases everywhere, the experts' included, attention sinks, and any pattern of windows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor, Target, router_tensor, sink_tensors
from upcycle.ffn.moe_shape import MoeShape, Part

# By hidden_act: the gain in gate * sigmoid(gain * gate).
_GAINS = {"silu": 1.0, "swish": 1.0, "quick_gelu": 1.702}


class GptOss(Target):
    """Routes by the top-k of the logits and a softmax over those. Experts compute ``gate * sigmoid(gain * gate) * (up + 1)``.

    The gain is written as 1, the clamps of gate and up as numbers that are never reached, 1 is taken off up's bias, and up is scaled
    (see :mod:`upcycle.ffn.shifted_up`). The class reads gain and clamp from ``config.json``; engines that have GPT-OSS's own numbers
    in their kernels would answer with garbage. Sinks do nothing. The class has no attention by SDPA.
    """

    name = "gpt_oss"
    title = "GPT-OSS"
    architecture = "GptOssForCausalLM"
    holds = frozenset(
        {Feature.PLAIN_QUERIES, Feature.ATTENTION_BIAS, Feature.MLP_BIAS, Feature.WINDOW, Feature.MIXED_WINDOWS}
    )
    router_semantics = "softmax of the top-k logits"
    router = "router"

    def lacks(self, dense: DenseConfig, more: Iterable[Feature] = ()) -> list[Feature]:
        """Return what the base class does, and the activation if experts cannot have it."""
        other = [] if dense.hidden_act in _GAINS else [Feature.ACTIVATION]
        return [*super().lacks(dense, more), *other]

    def remarks(self, dense: DenseConfig) -> list[str]:
        """Return what users should know: which programs run it."""
        own = (
            "gpt_oss is the only stock MoE architecture with biases in its experts; transformers reads its swiglu_alpha and "
            "swiglu_limit from config.json, other engines take GPT-OSS's own: compare before you serve it (upcycle verify --engine)"
        )
        return [*super().remarks(dense), own]

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; the class makes the mask of a window even where no layer has one, so a size is always written."""
        return {
            "intermediate_size": shape.expert_size,
            "num_local_experts": shape.experts,
            "attention_bias": dense.qkv_bias,
            "sliding_window": dense.window or dense.max_position_embeddings,
            "layer_types": dense.layer_types,
            "swiglu_alpha": _GAINS[dense.hidden_act],
            "swiglu_limit": 1e30,
        }

    def full_config(self, dense: DenseConfig, shape: MoeShape, dtype: str) -> dict[str, Any]:
        """Return all keys; float16 has no number as large as the clamp, and none larger than its own largest."""
        config = super().full_config(dense, shape, dtype)
        return {**config, "swiglu_limit": 65504.0} if dtype == "float16" else config

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the sinks, the router, and all experts in two tensors with their biases: stored as they are in memory alone."""
        prefix, d, m, experts = self.module_paths.block_of(layer), dense.hidden_size, shape.expert_size, shape.experts

        def fused(name: str, each: tuple[int, ...], kind: Any) -> OutputTensor:
            return OutputTensor(
                f"{prefix}.experts.{name}", (experts, *each), tuple(Part(kind, e) for e in range(experts))
            )

        return [
            *sink_tensors(f"{self.module_paths.layer(layer)}.self_attn", dense),
            router_tensor(f"{prefix}.router.weight", dense, shape),
            OutputTensor(f"{prefix}.router.bias", (experts,), (Part("filled", factor=0.0, size=experts),)),
            fused("gate_up_proj", (d, 2 * m), "shifted_gate_up"),
            fused("gate_up_proj_bias", (2 * m,), "shifted_gate_up_bias"),
            fused("down_proj", (m, d), "shifted_down"),
            fused("down_proj_bias", (d,), "down_bias"),
        ]
