"""Co-activation k-means: neurons that are active on the same tokens share an expert."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn.functional import normalize

from upcycle.ffn.activations import Activations, required
from upcycle.ffn.feed_forward import FeedForward
from upcycle.plugins import PluginParameters
from upcycle.splitters.grouping.balanced_kmeans import balanced_kmeans
from upcycle.splitters.grouping.neuron_profiles import (
    coactivation,
    draw_seed,
    principal_profiles,
    sketched_profiles,
)
from upcycle.splitters.grouping.plain_sum import PlainSumPartition


class CoactivationKMeansParameters(PluginParameters):
    """Parameters of :class:`CoactivationKMeans`."""

    features: Literal["sketch", "gram"] = Field(
        "sketch", description="how a profile is shortened: sketch (random projection) or gram (top eigenvectors, F x F)"
    )
    sketch: int = Field(256, ge=2, le=8192, description="dimensions of a shortened activation profile")
    n_init: int = Field(1, ge=1, le=100, description="how many starts the best clustering is chosen from")


class CoactivationKMeans(PlainSumPartition):
    """Our own variant of MoEfication's co-activation split (arXiv 2110.01786): k-means where the paper cuts a graph.

    Neuron j's profile is ``|h_j(t)|`` over all tokens, scaled to length one, so that the inner product of two profiles is
    how often and how strongly both are active together. Balanced k-means then groups profiles. Scaling to length one
    makes the norm of a neuron's down column irrelevant: a constant factor per neuron drops out. Profiles are shortened
    to ``sketch`` dimensions: by a seeded Gaussian projection, streamed, or by the top eigenvectors of their (weighted)
    Gram matrix, which is exact up to the spectrum it leaves out and needs ``4 F^2`` bytes.

    Deviations from MoEfication: no graph, no METIS, no threshold and no clipping; magnitudes, because activations of
    gated FFNs are signed; every token counts by its weight. Chosen experts are summed without weights, so the ``paper``
    scale is ``sum`` = K.
    """

    name = "coactivation_kmeans"
    title = "Balanced k-means on activation profiles"
    paper = "https://arxiv.org/abs/2110.01786"
    calibrated = True
    Parameters = CoactivationKMeansParameters
    parameters: CoactivationKMeansParameters

    def labels(
        self,
        neurons: torch.Tensor,
        experts: int,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Cluster the profiles; neurons that are never active have none and fill the room that is left."""
        given, size, seed = required(activations, self.name), self.parameters.sketch, draw_seed(rng)
        if self.parameters.features == "gram":
            profiles = principal_profiles(coactivation(given, neurons), size, seed)
        else:
            profiles = sketched_profiles(given, neurons, size, seed)
        return balanced_kmeans(normalize(profiles, dim=1), experts, seed=draw_seed(rng), n_init=self.parameters.n_init)
