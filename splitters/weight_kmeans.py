"""Weight k-means: neurons with similar weights share an expert."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn.functional import normalize

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.form import FfnForm
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.base import Partition
from upcycle.plugins import PluginParameters
from upcycle.splitters.grouping.balanced_kmeans import balanced_kmeans
from upcycle.splitters.grouping.neuron_profiles import draw_seed


class WeightKMeansParameters(PluginParameters):
    """Parameters of :class:`WeightKMeans`."""

    matrix: Literal["up", "gate", "both"] = Field(
        "up", description="which projection's rows are clustered: up, gate, or both side by side"
    )
    n_init: int = Field(1, ge=1, le=100, description="how many starts the best clustering is chosen from")


class WeightKMeans(Partition):
    """LLaMA-MoE's "Independent (Clustering)" (arXiv 2406.16554) and MoEfication's parameter clustering (arXiv 2110.01786).

    Balanced k-means on rows ``[F, d]`` scaled to length one, over which projection ``matrix`` decides: LLaMA-MoE's shipped
    script takes up; MoEfication's FFNs have one first matrix, which ``up`` is where there is no gate and which ``gate`` is
    nearest to where there is one. Biases are not part of the rows.

    Deviations: the clustering is :func:`~upcycle.splitters.grouping.balanced_kmeans.balanced_kmeans` with a seed of its own for
    every layer, where both papers take k_means_constrained's with seed 0; ``both`` is ours; clusters may differ by one
    neuron where the number of experts does not divide. LLaMA-MoE's documented cosine metric was never reachable from its
    command line, so rows of length one at Euclidean distance are what it ran. The ``paper`` scale is LLaMA-MoE's E/K;
    MoEfication's is ``sum``.
    """

    name = "weight_kmeans"
    title = "Balanced k-means on weights"
    paper = "https://arxiv.org/abs/2406.16554"
    Parameters = WeightKMeansParameters
    parameters: WeightKMeansParameters

    def check(self, shape: MoeShape) -> None:
        """Refuse to cluster gate rows where there are none."""
        self._refuse_missing_gate(shape.form)

    def labels(
        self,
        neurons: torch.Tensor,
        experts: int,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Cluster the rows; activations are not used.

        Raises:
            UsageError: ``matrix`` names the gate, and there is none.
        """
        self._refuse_missing_gate(ffn.form)
        matrices = [ffn.gate] if ffn.gate is not None and self.parameters.matrix != "up" else []
        matrices += [ffn.up] if self.parameters.matrix != "gate" else []
        points = torch.cat([unit_rows(matrix, neurons) for matrix in matrices], dim=1)
        return balanced_kmeans(points, experts, seed=draw_seed(rng), n_init=self.parameters.n_init)

    def _refuse_missing_gate(self, form: FfnForm) -> None:
        if self.parameters.matrix != "up" and not form.gated:
            raise UsageError(
                f"weight_kmeans is to cluster rows of gate (matrix={self.parameters.matrix}), and this model's FFNs have no gate",
                hint="--param matrix=up",
            )


def unit_rows(matrix: torch.Tensor, neurons: torch.Tensor) -> torch.Tensor:
    """Return fp32 ``[M, d]``: the neurons' rows of ``matrix`` ``[F, d]``, scaled to length one (a row of zeros stays zero)."""
    return normalize(matrix[neurons].float(), dim=1)
