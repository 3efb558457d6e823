"""Mixtral: Llama's or Mistral's block with routed experts in every layer."""

from __future__ import annotations

from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor, expert_tensors, router_tensor
from upcycle.architectures.moe.centred import CentringTarget
from upcycle.ffn.moe_shape import MoeShape


class Mixtral(CentringTarget):
    """Routes by a softmax over all experts and top-k, renormalised to sum to 1 (arXiv 2401.04088 and the stock implementation)."""

    name = "mixtral"
    title = "Mixtral"
    architecture = "MixtralForCausalLM"
    holds = frozenset({Feature.PLAIN_QUERIES, Feature.WINDOW, Feature.BARE_LAYER_NORMS})
    router_semantics = "top-k of softmax, normalised to sum 1"
    masks_rotary = True

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; ``intermediate_size`` is the width of one expert."""
        return {
            "intermediate_size": shape.expert_size,
            "num_local_experts": shape.experts,
            "sliding_window": dense.windows[0],
            "router_jitter_noise": 0.0,
        }

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router, then w1 (gate), w3 (up) and w2 (down) of each expert."""
        # Fused tensors are named as in memory; per-expert ones keep the block's name of the first Mixtral release.
        paths = self.module_paths
        prefix = paths.block_of(layer) if layout == "fused" else f"{paths.layer(layer)}.block_sparse_moe"
        router = router_tensor(f"{prefix}.gate.weight", dense, shape)
        return [router, *expert_tensors(f"{prefix}.experts", ("w1", "w3", "w2"), dense, shape, layout)]
