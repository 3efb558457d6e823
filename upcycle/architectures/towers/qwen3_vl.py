"""Qwen3-VL: Qwen3's text model with positions in three dimensions, which also adds image features between its first layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.dense.llama_like.qwen3 import Qwen3
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor
from upcycle.architectures.moe.softmax.qwen3_moe import Qwen3Moe
from upcycle.architectures.towers import samples
from upcycle.architectures.towers.wrapper import Wrapper, renamed_parts
from upcycle.ffn.moe_shape import MoeShape


class Qwen3VlText(Qwen3):
    """Describes the text model of Qwen3-VL: Qwen3's block, without windows."""

    name = "qwen3_vl_text"
    title = "Qwen3 in Qwen3-VL"
    targets = ("qwen3_vl_moe_text",)
    defaults = {**Qwen3.defaults, "max_position_embeddings": 128000}
    rope_theta = 500000.0

    def windows(self, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
        """Return no windows, which this class never has."""
        return (None,) * layers

    def rewritten(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration as it is: no causal language model has it, so that there is none to name."""
        return dict(raw)


class Qwen3VlMoeText(Qwen3Moe):
    """Routes by a softmax and top-k, always normalised. Experts are stored fused, in either layout: there is no other form."""

    name = "qwen3_vl_moe_text"
    title = "Qwen3-MoE in Qwen3-VL-MoE"
    architecture = "Qwen3VLMoeForConditionalGeneration"
    holds = frozenset({Feature.QUERY_NORMS, Feature.ATTENTION_BIAS, Feature.DENSE_FIRST, Feature.DENSE_LAYERS})
    holds_unnormalized = False
    router_semantics = "top-k of softmax, normalised to sum 1"

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return Qwen3-MoE's keys without those that this class does not know."""
        keys = super().config(dense, shape)
        unknown = ("norm_topk_prob", "use_sliding_window", "sliding_window")
        return {key: value for key, value in keys.items() if key not in unknown}

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router, then the routed experts, fused."""
        return super().moe_tensors(dense, shape, layer, "fused")


qwen3_vl = Wrapper(
    "qwen3_vl",
    "Qwen3-VL",
    samples.patches,
    moe="qwen3_vl_moe",
    families={Qwen3VlText.name: Qwen3VlText},
    targets={Qwen3VlMoeText.name: Qwen3VlMoeText},
    typed="mm_token_type_ids",
    rewrite=partial(renamed_parts, "qwen3_vl", "qwen3_vl_moe"),
)
