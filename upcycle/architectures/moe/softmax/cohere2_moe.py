"""Cohere2-MoE: attention and experts side by side behind one LayerNorm, rotary only where there is a window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.base import (
    ExpertLayout,
    OutputTensor,
    Target,
    expert_tensors,
    gated_tensors,
    router_tensor,
    shared_parts,
)
from upcycle.ffn.moe_shape import MoeShape


class Cohere2Moe(Target):
    """Routes by a softmax of the top-k logits; shared experts are added (``sum``; by default the class averages).

    ``rms_norm_eps`` must be null: a number would turn every LayerNorm into an RMSNorm. A dense layer is given rotary
    embeddings whatever its window unless ``prefix_dense_sliding_window_pattern`` differs from 1.
    """

    name = "cohere2_moe"
    title = "Cohere2-MoE"
    architecture = "Cohere2MoeForCausalLM"
    holds = frozenset(
        {
            Feature.PLAIN_QUERIES,
            Feature.PARALLEL_BLOCK,
            Feature.LOGIT_SCALE,
            Feature.ATTENTION_BIAS,
            Feature.WINDOW,
            Feature.MIXED_WINDOWS,
            Feature.SHARED_EXPERTS,
            Feature.DENSE_FIRST,
            Feature.DENSE_LAYERS,
        }
    )
    router_semantics = "softmax of the top-k logits; shared experts ungated (sum)"
    rotates_pairs = True
    shared = "shared_experts"

    def stored(self, dense: DenseConfig) -> DenseConfig:
        """Return the configuration with a window as long as the context on rotated layers that have none.

        Where exactly the layers with windows are rotated then, the class does so by itself, and no thetas are left.
        """
        dense = super().stored(dense)
        theta, context = dense.rope_parameters["rope_theta"], dense.max_position_embeddings
        rotated = dense.layer_thetas
        windows = tuple(w or (context if layer else None) for w, layer in zip(dense.windows, rotated, strict=True))
        if rotated == [theta if window else 0 for window in windows] and len({*windows} - {None}) == 1:
            return replace(dense, windows=windows, thetas=())
        return dense

    def remarks(self, dense: DenseConfig) -> list[str]:
        """Return what users should know: a model without windows is given the longest one."""
        given = f"{self.name} rotates layers with a window alone: all are given one of {dense.max_position_embeddings}, the context"
        return [*super().remarks(dense), *([given] if dense.window is None and dense.layer_thetas[0] else [])]

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return its own keys; ``intermediate_size`` is the width of one expert, routed or shared."""
        return {
            "intermediate_size": shape.expert_size,
            "num_experts": shape.experts,
            "num_shared_experts": shape.shared,
            "shared_expert_combination_strategy": "sum",
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
            "attention_bias": dense.qkv_bias,
            "logit_scale": dense.logits_multiplier,
            "layer_norm_eps": dense.rms_norm_eps,
            "rms_norm_eps": None,
            "sliding_window": dense.window,
            "layer_types": dense.layer_types,
            "mlp_layer_types": ["sparse" if i in shape.moe_layers else "dense" for i in range(dense.num_hidden_layers)],
            "prefix_dense_intermediate_size": dense.intermediate_size,
            "prefix_dense_sliding_window_pattern": 2,
        }

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router, the shared experts where there are any, then the routed experts."""
        prefix, size = self.module_paths.block_of(layer), shape.shared * shape.expert_size
        shared = gated_tensors(f"{prefix}.shared_experts", shared_parts(shape, 0), dense, size) if shape.shared else []
        return [
            router_tensor(f"{prefix}.gate.weight", dense, shape),
            *shared,
            *expert_tensors(f"{prefix}.experts", ("gate_proj", "up_proj", "down_proj"), dense, shape, layout),
        ]
