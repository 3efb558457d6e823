"""Leaves out the experts that add least to the output where they are chosen (REAP)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.architectures.expert_terms import LayerCut
from upcycle.methods.compressing.base import Compression, LayerSource, best

if TYPE_CHECKING:
    import torch

    from upcycle.methods.compressing.observations import LayerObservations


class Reap(Compression):
    """Implements router-weighted expert activation pruning (Lasby et al. 2025, arXiv 2510.13999, equation 9).

    The score of an expert is the mean of ``weight * ||f_e(x)||_2`` over the tokens that chose it; one that no token chose has 0.
    """

    name = "reap"
    title = "Router-weighted expert activation pruning"
    paper = "https://arxiv.org/abs/2510.13999"

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        return best(reap_scores(source.seen), keep)


def reap_scores(seen: LayerObservations) -> torch.Tensor:
    """Return the score of every expert, fp64 ``[E]``."""
    return seen.saliency / seen.load.clamp(min=1)
