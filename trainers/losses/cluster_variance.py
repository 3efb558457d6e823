"""MoEC's variance loss: experts of a cluster should be equally probable, so that clusters form. E experts, G clusters."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.trainers.distributed.reduction import counted, token_count
from upcycle.trainers.losses.base import Loss, LossParameters
from upcycle.trainers.routing.router_records import RouterRecord


class ClusterVarianceParameters(LossParameters):
    """Parameters of :class:`ClusterVariance`."""

    clusters: int = Field(2, ge=1, description="groups of consecutive experts of one size (MoEC: 8 of 8 experts)")
    relaxed: bool = Field(
        False,
        description="divide by exp(mean probability of the likeliest cluster - that of the second), so that the loss counts less "
        "where one cluster is preferred already (a variant in the authors' code)",
    )


class ClusterVariance(Loss):
    """``E mean_g var_{i in g} P_i``: P_i is expert i's mean probability over the batch, var the population's (arXiv 2207.09094).

    It is 0 where the experts of each cluster are equally probable, whatever the clusters are. The paper's loss is the sum of this
    and of ``switch_balance``, both with coefficient 0.01; its other part, cluster dropout, is ``control: cluster_dropout``. P is a
    mean here where the authors' code has sums, so that the loss does not grow with the batch.
    """

    name = "cluster_variance"
    title = "Variance within clusters of experts (MoEC)"
    paper = "https://arxiv.org/abs/2207.09094"
    Parameters = ClusterVarianceParameters
    parameters: ClusterVarianceParameters

    def sums(self, record: RouterRecord, mask: torch.Tensor | None) -> torch.Tensor:
        """``[E + 1]``: probabilities, and the number of tokens."""
        probabilities = record.probabilities
        return torch.cat([counted(probabilities, mask), token_count(probabilities, mask)])

    def value(self, sums: torch.Tensor, record: RouterRecord) -> torch.Tensor:
        """One layer's loss, a scalar, from its sums over all tokens.

        Raises:
            UsageError: the experts do not divide into clusters of equal size.
        """
        mean = sums[:-1] / sums[-1].clamp(min=1)
        clusters = self.parameters.clusters
        if len(mean) % clusters:
            raise UsageError(
                f"losses.cluster_variance.clusters: {clusters} does not divide {len(mean)} experts",
                hint="clusters have one size",
            )
        groups = mean.view(clusters, -1)
        variance: torch.Tensor = len(mean) * groups.var(1, correction=0).mean()
        if self.parameters.relaxed and clusters > 1:
            first, second = groups.mean(1).topk(2).values
            variance = variance / (first - second).exp()
        return variance
