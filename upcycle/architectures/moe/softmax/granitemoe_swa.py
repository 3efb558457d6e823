"""Granite-MoE with sliding windows: windows, sinks, and layers without rotary embedding in Granite-MoE's block."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor, sink_tensors
from upcycle.architectures.moe.softmax.granitemoeshared import GraniteMoeShared
from upcycle.ffn.moe_shape import MoeShape


class GraniteMoeSwa(GraniteMoeShared):
    """Holds layers without rotary embedding (theta 0), and any pattern of windows.

    Every head has an attention sink, written so low that it does nothing where the dense model has none. The class has no
    attention by SDPA: transformers runs it eagerly, or with FlashAttention.
    """

    name = "granitemoe_swa"
    title = "Granite-MoE with sliding windows"
    architecture = "GraniteMoeSWAForCausalLM"
    holds = GraniteMoeShared.holds | {
        Feature.WINDOW,
        Feature.MIXED_WINDOWS,
        Feature.LAYER_ROPES,
        Feature.SINKS,
    }

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; the class makes the mask of a window even where no layer has one, so a size is always written."""
        return {
            **super().config(dense, shape),
            "sliding_window": dense.window or dense.max_position_embeddings,
            "layer_types": dense.layer_types,
            "layer_rope_theta": dense.layer_thetas,
        }

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the tensors of Granite-MoE, which this architecture stores as it has them in memory alone, and the sinks."""
        attention = f"{self.module_paths.layer(layer)}.self_attn"
        return [*super().moe_tensors(dense, shape, layer, "fused"), *sink_tensors(attention, dense)]
