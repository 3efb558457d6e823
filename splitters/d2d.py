"""D2DMoE's split: neurons whose gate rows point in similar directions share an expert."""

from __future__ import annotations

import torch

from upcycle.ffn.activations import Activations
from upcycle.ffn.feed_forward import FeedForward
from upcycle.splitters.grouping.balanced_kmeans import balanced_kmeans
from upcycle.splitters.grouping.neuron_profiles import draw_seed
from upcycle.splitters.grouping.plain_sum import PlainSumPartition
from upcycle.splitters.weight_kmeans import unit_rows


class D2D(PlainSumPartition):
    """The expert split of D2DMoE (arXiv 2310.04361): balanced k-means on gate rows ``[F, d]`` scaled to length one.

    The rows are those of the projection that is activated: gate in a gated FFN, the first of two where there is no gate.
    Biases are not part of them. This is the second of D2DMoE's four stages. Its router predicts the norm of every expert's
    output (router ``d2d_norms``), and its rule runs every expert whose norm is near the largest (routing ``dynamic_k``): both need
    ``upcycle_moe`` (``upcycle convert d2dmoe``). In stock architectures a fixed number of experts runs behind a linear router
    (``ridge`` with target ``output_norm``, or ``upcycle convert d2dmoe_stock``). Chosen experts are summed without weights, so
    the ``paper`` scale is ``sum`` = K.

    Deviations: the model is not fine-tuned for sparsity here (``upcycle train d2dmoe_sparsify`` does it), and attention's
    projections become experts only where the recipe's ``projections`` asks for it. The clustering is
    :func:`~upcycle.splitters.grouping.balanced_kmeans.balanced_kmeans` where D2DMoE takes k_means_constrained's.
    """

    name = "d2d"
    title = "D2DMoE split"
    paper = "https://arxiv.org/abs/2310.04361"

    def labels(
        self,
        neurons: torch.Tensor,
        experts: int,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Cluster the activated rows; activations are not used."""
        return balanced_kmeans(unit_rows(ffn.activated_rows, neurons), experts, seed=draw_seed(rng))
