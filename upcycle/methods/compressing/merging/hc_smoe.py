"""Merges experts whose mean outputs are close, found by hierarchical clustering (HC-SMoE)."""

from __future__ import annotations

from upcycle.architectures.expert_terms import LayerCut
from upcycle.methods.compressing.base import Compression
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.methods.compressing.merging.merge_groups import merged


class HcSmoe(Compression):
    """Implements hierarchical clustering of experts (Chen et al. 2024, arXiv 2410.08589): average linkage of mean outputs.

    Every expert is described by its mean output over the calibration's tokens, whether they chose it or not; clusters whose members
    are closest on average (Euclidean) are joined until as many are left as are kept. A cluster becomes the mean of its members,
    weighted by how many tokens chose each.

    Deviations: the means are over the sampled tokens. The paper keeps all router rows, and sends a token to the cluster of the chosen
    one; stock architectures have one row per expert: that of the member most used.
    """

    name = "hc_smoe"
    title = "Hierarchical clustering of experts"
    paper = "https://arxiv.org/abs/2410.08589"
    grouped = True

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        from scipy.cluster.hierarchy import cut_tree, linkage

        tree = linkage(source.seen.mean_output.double().numpy(), method="average", metric="euclidean")
        label = cut_tree(tree, n_clusters=keep)[:, 0]
        groups = [[e for e in range(source.seen.experts) if label[e] == cluster] for cluster in range(keep)]
        return merged(groups, source.seen.load)
