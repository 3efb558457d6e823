"""Leaves out the experts that add least to the output where they are chosen (REAP)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.methods.compressing.dropping.scored import Scored
from upcycle.methods.compressing.layer_source import LayerSource

if TYPE_CHECKING:
    import torch

    from upcycle.methods.compressing.observed_layer import LayerObservations


class Reap(Scored):
    """Implements router-weighted expert activation pruning (Lasby et al. 2025, arXiv 2510.13999, equation 9).

    The score of an expert is the mean of ``weight * ||f_e(x)||_2`` over the tokens that chose it; one that no token chose has 0.

    With ``layers=uneven`` (ours), the scores of all layers are compared, each divided by its layer's sum.
    """

    name = "reap"
    title = "Router-weighted expert activation pruning"
    paper = "https://arxiv.org/abs/2510.13999"

    def scores(self, source: LayerSource) -> torch.Tensor:
        """See the class."""
        return reap_scores(source.seen)


def reap_scores(seen: LayerObservations) -> torch.Tensor:
    """Return the score of every expert, fp64 ``[E]``."""
    return seen.saliency / seen.load.clamp(min=1)
