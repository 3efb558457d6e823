"""Merges the experts that are used least into those most used whose router logits go with theirs (M-SMoE)."""

from __future__ import annotations

import torch

from upcycle.architectures.expert_terms import LayerCut
from upcycle.methods.compressing.base import Compression
from upcycle.methods.compressing.layer_source import LayerSource
from upcycle.methods.compressing.merging.merge_groups import aligned, merged


class MSmoe(Compression):
    """Implements the merging of "Merge, then Compress" (Li et al. 2023, arXiv 2310.01334, section 3.1).

    The experts of most use stay; every other one joins the one of these whose router logits over the calibration's tokens are most
    like its own (cosine). Neurons are first put into the order in which they match those of the expert that stays: with all
    three matrices of a gated expert, where the paper's have two. A group becomes the mean of its members, weighted by use.

    Deviations: the paper keeps all router rows, the merged ones pointing to one expert; stock architectures have one row per
    expert: that of the expert that stays. It lets layers keep different numbers of experts; here all keep the same.
    """

    name = "m_smoe"
    title = "Merging by router logits (M-SMoE)"
    paper = "https://arxiv.org/abs/2310.01334"
    grouped = True

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """See the class."""
        seen = source.seen
        order = torch.sort(seen.load, descending=True, stable=True).indices.tolist()
        stay = order[:keep]
        length = seen.logits_gram.diagonal().clamp(min=1e-30).sqrt()
        alike = seen.logits_gram / length / length[:, None]
        groups = {expert: [expert] for expert in stay}
        for expert in order[keep:]:
            groups[max(stay, key=lambda e: (float(alike[expert, e]), -e))].append(expert)
        orders: dict[int, tuple[int, ...]] = {}
        for first, group in groups.items():
            unused = float(seen.load[first]) == 0  # the most used one, so all are: these are averaged alike
            others = [expert for expert in group if expert != first and (unused or float(seen.load[expert]) > 0)]
            orders.update(aligned(source, first, others))
        return merged([*groups.values()], seen.load, orders)
