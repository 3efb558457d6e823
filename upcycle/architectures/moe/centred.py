"""Targets with RMSNorms that hold LayerNorms without weights and biases: whatever adds to the stream adds no mean.

A LayerNorm takes the mean off its input, and an RMSNorm does the rest. Where neither the embeddings nor the outputs of attention and
FFN have a mean over the hidden dimension, the stream has none, and the two are the same function. What is left out of the stream,
a LayerNorm would have taken off: the model computes the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.moe.base import Target
from upcycle.architectures.tensor_origin import Origin
from upcycle.ffn.centred_experts import CentredExperts

if TYPE_CHECKING:
    from upcycle.ffn.expert_tensors import ExpertTensors
    from upcycle.ffn.gated_experts import BuildsParts

_NORMS = ("input_layernorm", "post_attention_layernorm")


class CentringTarget(Target):
    """Writes RMSNorms of ones, and takes the means off the embeddings, the output projections and the down projections."""

    def centred(self, dense: DenseConfig) -> str | None:
        """Name what is part of the weights, where the dense model has such LayerNorms."""
        return "the means that its LayerNorms take off" if Feature.BARE_LAYER_NORMS in dense.special else None

    def layer_specs(self, family: Family, dense: DenseConfig, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the family's tensors, and the weights of both norms."""
        prefix = family.module_paths.layer(layer)
        norms = {f"{prefix}.{norm}.weight": (dense.hidden_size,) for norm in _NORMS} if self.centred(dense) else {}
        return {**super().layer_specs(family, dense, layer), **norms}

    def last_specs(self, family: Family, dense: DenseConfig) -> dict[str, tuple[int, ...]]:
        """Return the family's tensors, and the weight of the last norm."""
        norm = {family.module_paths.final_norm_weight: (dense.hidden_size,)} if self.centred(dense) else {}
        return {**super().last_specs(family, dense), **norm}

    def origin(self, family: Family, dense: DenseConfig, name: str) -> Origin:
        """Return ones for norms; what adds to the stream loses its mean."""
        if not self.centred(dense):
            return super().origin(family, dense, name)
        paths, d = family.module_paths, dense.hidden_size
        if name == paths.final_norm_weight or name.endswith(tuple(f".{norm}.weight" for norm in _NORMS)):
            return Origin(paths.embedding_weight, filled=((d,), 1.0))
        origin = super().origin(family, dense, name)
        if name == paths.embedding_weight:
            return replace(origin, centred="rows")
        return replace(origin, centred="columns", head=d) if ".o_proj." in name else origin

    def built(self, tensors: ExpertTensors, dense: DenseConfig) -> BuildsParts:
        """Return the experts, whose down projections add no mean."""
        built = super().built(tensors, dense)
        return CentredExperts(built) if self.centred(dense) else built
