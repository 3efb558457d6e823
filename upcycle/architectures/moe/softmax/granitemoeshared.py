"""Granite-MoE with an ungated shared expert beside the routed ones."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.module_paths import ModulePaths
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor
from upcycle.architectures.moe.softmax.granitemoe import GraniteMoe
from upcycle.ffn.moe_shape import MoeShape, Part


class GraniteMoeShared(GraniteMoe):
    """Adds ``shared_mlp(x)`` to Granite-MoE; without shared experts its size is 0, and the stock class makes none."""

    name = "granitemoeshared"
    title = "Granite-MoE with shared experts"
    architecture = "GraniteMoeSharedForCausalLM"
    holds = GraniteMoe.holds | {Feature.SHARED_EXPERTS}
    module_paths = ModulePaths(blocks=("block_sparse_moe", "shared_mlp"))

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return Granite-MoE's keys, and the width of one FFN that is all shared experts."""
        return {**super().config(dense, shape), "shared_intermediate_size": shape.shared * shape.expert_size}

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return Granite-MoE's tensors and the shared FFN, whose gate and up rows are one tensor."""
        routed = super().moe_tensors(dense, shape, layer, layout)
        if not shape.shared:
            return routed
        prefix, d, size = self.module_paths.block_of(layer, 1), dense.hidden_size, shape.shared * shape.expert_size
        both = (Part("shared_gate"), Part("shared_up"))
        return [
            *routed,
            OutputTensor(f"{prefix}.input_linear.weight", (2 * size, d), both),
            OutputTensor(f"{prefix}.output_linear.weight", (d, size), (Part("shared_down"),)),
        ]
