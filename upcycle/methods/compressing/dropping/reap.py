"""Leaves out the experts that add least to the output where they are chosen (REAP)."""

from __future__ import annotations

from upcycle.architectures.expert_terms import LayerCut
from upcycle.methods.compressing.base import Compression, LayerSource, best


class Reap(Compression):
    """Implements router-weighted expert activation pruning (Lasby et al. 2025, arXiv 2510.13999, equation 9).

    The score of an expert is the mean of ``weight * ||f_e(x)||_2`` over the tokens that chose it; one that no token chose has 0.
    """

    name = "reap"
    title = "Router-weighted expert activation pruning"
    paper = "https://arxiv.org/abs/2510.13999"

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        return best(source.seen.saliency / source.seen.load.clamp(min=1), keep)
