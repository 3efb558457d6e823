"""Leaves out experts at random, for comparison."""

from __future__ import annotations

from upcycle.architectures.expert_terms import LayerCut
from upcycle.methods.compressing.base import Compression
from upcycle.methods.compressing.layer_source import LayerSource


class RandomExperts(Compression):
    """Keeps experts that are drawn without looking, in every layer others: what any method has to beat."""

    name = "random_experts"
    title = "Random experts"
    paper = None
    looks = False
    grouped = True

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        import torch

        from upcycle.ffn.random_weights import stream

        drawn = torch.randperm(source.seen.experts, generator=stream(source.seed, f"layer {source.layer}", "experts"))
        return LayerCut.keeping(drawn[:keep].tolist())
