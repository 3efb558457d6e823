"""Centroid router: rows are the centres of the experts' weights, or of the inputs that they respond to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch.nn.functional import normalize

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ZERO_NEURON, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.router_capture import ExpertMap, of_largest
from upcycle.plugins import PluginParameters
from upcycle.routers.calibrated.base import CalibratedParameters, CalibratedRouter

_PASSES = 2  # of mini-batch k-means over the calibration tokens


class CentroidParameters(CalibratedParameters):
    """Parameters of :class:`CentroidRouter`."""

    of: Literal["weights", "inputs"] = Field(
        "weights",
        description="centres of the experts' gate rows, or of clusters of the layer's inputs (needs calibration)",
    )


class CentroidRouter(CalibratedRouter):
    """Two training-free routers.

    ``of: weights`` is MoEfication's similarity selection (arXiv 2110.01786): row i is the mean of the L2-normalised
    first-layer rows of expert i's neurons: the gate's, or up's where there is no gate. Deviations: the score is the dot
    product with that mean, which is the mean cosine of x with the expert's rows; the paper also offers cosine and Euclidean
    distance to the mean, which need a bias or normalised rows. It normalises x, which changes no token's choice. Its chosen
    experts have weight one; here they weigh the same (``tolerance``). Biases are not looked at. The method counts on ReLU:
    where a SwiGLU gate is very negative its neurons are silent too, but where the up projection is large with either sign
    they are not, which no mean of rows can say.

    ``of: inputs`` is the gate of LLaMA-MoE v2 (arXiv 2411.15708): k-means of the layer's inputs with E clusters, rows are
    the centres. Deviations: its clusters are balanced and its experts are given out in the order of the clusters. Here
    tokens and centres have length one (a native router has no bias, so that only then the largest logit is the nearest
    centre), k-means works on mini-batches and balances nothing, and each centre gets the expert that the tokens which
    choose it want: the assignment of centres to experts that captures the largest energy at top-k.
    """

    name = "centroid"
    title = "Centroids of weights or inputs"
    paper = "https://arxiv.org/abs/2110.01786"
    Parameters = CentroidParameters
    parameters: CentroidParameters

    def __init__(self, parameters: PluginParameters) -> None:
        super().__init__(parameters)
        self.calibrated = self.parameters.of == "inputs"

    def directions(
        self,
        blueprint: LayerBlueprint,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Return fp64 ``[E, d]``."""
        if self.parameters.of == "weights" or activations is None:
            return weight_centres(blueprint, ffn)
        centres = input_centres(activations, len(blueprint.routed), rng)
        return centres[_matched(activations, blueprint, centres)].double()


def weight_centres(blueprint: LayerBlueprint, ffn: FeedForward) -> torch.Tensor:
    """Return fp64 ``[E, d]``: the mean L2-normalised gate row (up row without a gate) of every expert, zero neurons left out."""
    unit = normalize(ffn.activated_rows.double(), dim=1)
    real = (expert.neurons[expert.neurons != ZERO_NEURON] for expert in blueprint.routed)
    return torch.stack([unit[neurons].sum(0) / max(1, len(neurons)) for neurons in real])


def input_centres(activations: Activations, clusters: int, rng: torch.Generator) -> torch.Tensor:
    """Return fp32 ``[clusters, d]``, rows of length one: k-means of the directions of all tokens that are not held out.

    Raises:
        UsageError: there are fewer tokens than clusters.
    """
    from sklearn.cluster import MiniBatchKMeans

    seed = int(torch.randint(2**31 - 1, (1,), generator=rng))
    kmeans = MiniBatchKMeans(clusters, random_state=seed)
    fitted = False
    for _ in range(_PASSES):
        for x, weight in _at_least(clusters, activations):
            kmeans.partial_fit(normalize(x).numpy(), sample_weight=weight.numpy())
            fitted = True
    if not fitted:
        raise UsageError(
            f"fewer than {clusters} calibration tokens cannot be put into {clusters} clusters",
            hint="give more calibration text, or choose another router",
        )
    return normalize(torch.from_numpy(kmeans.cluster_centers_).float())


def _at_least(count: int, activations: Activations) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the inputs ``[t, d]`` and weights ``[t]`` of one pass with ``t >= count``; fewer at the end are left out."""
    x: list[torch.Tensor] = []
    weight: list[torch.Tensor] = []
    for batch in activations.batches():
        if batch.held_out:
            continue
        x.append(batch.x)
        weight.append(batch.weight)
        if sum(map(len, x)) >= count:
            yield torch.cat(x), torch.cat(weight)
            x, weight = [], []


def _matched(activations: Activations, blueprint: LayerBlueprint, centres: torch.Tensor) -> torch.Tensor:
    """Return int64 ``[E]``: a centre for each expert, so that the tokens which choose a centre have most energy in its expert."""
    from scipy.optimize import linear_sum_assignment

    expert_map = ExpertMap(blueprint, activations.ffn)
    gains = torch.zeros(len(centres), len(centres), dtype=torch.float64)  # [expert, centre]
    for batch in activations.batches():
        if not batch.held_out:
            chosen = of_largest(batch.x @ centres.T, blueprint.top_k) * batch.weight[:, None]
            gains += expert_map.energies(batch.hidden).double().T @ chosen.double()
    return torch.from_numpy(linear_sum_assignment(gains.numpy(), maximize=True)[1])
