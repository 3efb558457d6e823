"""LLaMA-MoE's gradient splits: every expert takes the neurons that matter to one cluster of texts."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn.functional import normalize

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations, required
from upcycle.ffn.blueprint import ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.base import Partition, filled
from upcycle.plugins import PluginParameters
from upcycle.splitters.grouping.greedy_assignment import greedy_assignment


class ImportanceParameters(PluginParameters):
    """Parameters of :class:`Importance`."""

    variant: Literal["independent", "sharing_inner", "sharing_inter"] = Field(
        "independent",
        description="independent: a partition; sharing_inner: experts overlap; sharing_inter: common neurons are shared experts",
    )
    share_neurons: bool = Field(True, description="sharing_inter: the routed experts overlap (else: a partition)")
    expert_size: int = Field(0, ge=0, description="neurons per expert where experts overlap; 0: F / (E + S)")


class Importance(Partition):
    """LLaMA-MoE's splits by gradients (arXiv 2406.16554 and its code).

    ``v_c[j]`` is the mean ``|h_j * dL/dh_j|`` over the tokens of text cluster c, and expert c serves that cluster.

    - ``independent`` (in the code only, "Independent-Gradient"): again and again the best (score, expert) pair among the
      free neurons and the experts with room.
    - ``sharing_inner``: expert c takes the top m of ``v_c``; a neuron may be in several experts, or in none.
    - ``sharing_inter``: the neurons in the top m of most experts go to the shared experts, most wanted first, and leave
      the lists, which are then drawn up anew, until the shared experts are full. The routed experts take the top m of
      what is left (``share_neurons``, overlapping) or deal it out as ``independent`` does.

    Overlapping experts are the dense FFN for no router and no scale. The ``paper`` scale E/k is LLaMA-MoE's.

    Deviations: ties go to the lower neuron, then the lower expert (there: the last expert); only the scores at the input
    of down are used, not those at gate_proj's output; text clusters are the caller's, and where there are more than
    experts the most similar ones are merged; with shared experts, the first two variants give them the neurons that
    add most to the output (there: no shared experts); E not dividing F leaves some experts one neuron smaller.
    """

    name = "importance"
    title = "LLaMA-MoE gradient splits"
    paper = "https://arxiv.org/abs/2406.16554"
    calibrated = True
    needs_gradients = True
    Parameters = ImportanceParameters
    parameters: ImportanceParameters

    def __init__(self, parameters: ImportanceParameters) -> None:
        super().__init__(parameters)
        shares = {"independent": False, "sharing_inner": True, "sharing_inter": parameters.share_neurons}
        self.overlap = shares[parameters.variant]
        if self.overlap:
            self.kind = "overlap"
            self.exact_when_all_active = False

    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> int:
        """Return the width of every partition, unless experts overlap and the parameter ``expert_size`` says otherwise.

        Raises:
            UsageError: the sizes do not fit, or the variant and the number of shared experts do not.
        """
        size, variant = self.parameters.expert_size, self.parameters.variant
        if variant == "sharing_inter" and not shared:
            raise UsageError(
                "importance's variant sharing_inter puts common neurons into shared experts, and there are none",
                hint="--shared 1, or another variant",
            )
        if not size:
            return super().expert_size(intermediate_size, experts, shared, pad)
        if not self.overlap:
            raise UsageError(
                f"expert_size = {size}: experts that do not overlap share {intermediate_size} neurons equally",
                hint="leave expert_size out, or choose variant sharing_inner",
            )
        if size * (shared + 1) > intermediate_size:
            raise UsageError(
                f"expert_size = {size}: {shared} shared experts and a routed one need {size * (shared + 1)} different neurons, "
                f"the FFN has {intermediate_size}",
                hint=f"at most {intermediate_size // (shared + 1)}",
            )
        return size

    def labels(
        self,
        neurons: torch.Tensor,
        experts: int,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Split ``neurons`` greedily, without overlap."""
        scores = self._vectors(activations, experts)[:, neurons].T
        size, extra = divmod(len(neurons), experts)
        return greedy_assignment(scores, torch.full((experts,), size), extra)

    def blueprint(
        self,
        ffn: FeedForward,
        shape: MoeShape,
        scale: float,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> LayerBlueprint:
        """Give every expert the neurons of its text cluster; see the class."""
        size, everyone = shape.expert_size, torch.arange(ffn.intermediate_size)
        order = self._vectors(activations, shape.experts).argsort(dim=1, descending=True, stable=True)
        taken = everyone[:0]
        if shape.shared and self.parameters.variant == "sharing_inter":
            taken = most_wanted(order, shape.shared * size, size)
        elif shape.shared:
            taken = self.shared_neurons(shape.shared * size, ffn, rng, activations)
        free = ~torch.isin(everyone, taken)
        if self.overlap:
            groups = [neurons[:size].sort().values for neurons in (row[free[row]] for row in order)]
        else:
            labels = self.labels(everyone[free], shape.experts, ffn, rng, activations)
            groups = [everyone[free][labels == e] for e in range(shape.experts)]
        routed = tuple(ExpertSpec(filled(neurons, size)) for neurons in groups)
        shared = tuple(ExpertSpec(piece.sort().values) for piece in taken.split(size))
        return LayerBlueprint(ffn.layer, routed, shape.top_k, scale, shared if shape.shared else ())

    def _vectors(self, activations: Activations | None, experts: int) -> torch.Tensor:
        """Return fp32 ``[E, F]``: one vector per expert."""
        found = required(activations, self.name).importance
        if found is None or len(found) < experts:
            raise UsageError(
                f"importance needs a cluster of texts for each of {experts} experts, and found {0 if found is None else len(found)}",
                hint="name more text with --calibration, or choose fewer --experts",
            )
        return merge_similar(found.float(), experts)


def most_wanted(order: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """Return int64 ``[count]``: the neurons in the top ``size`` of most experts; lists close up over neurons already taken.

    Args:
        order: int64 ``[E, F]``, each expert's neurons, best first.
        count: how many to return; in the last round the lowest neurons are taken, as in LLaMA-MoE's code.
        size: length of an expert's list.
    """
    taken = torch.zeros(order.shape[1], dtype=torch.bool)
    chosen = []
    while count:
        free = ~taken[order]
        wanted = torch.bincount(order[free & (free.cumsum(dim=1) <= size)], minlength=len(taken))
        best = (wanted == wanted.max()).nonzero().flatten()[:count]
        taken[best] = True
        chosen.append(best)
        count -= len(best)
    return torch.cat(chosen)


def merge_similar(vectors: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``[count, F]``: ``vectors`` ``[C, F]``, of which the two with the highest cosine are averaged until few enough are left.

    An average weighs as much as all vectors that went into it.
    """
    members = torch.ones(len(vectors), 1)
    while len(vectors) > count:
        unit = normalize(vectors, dim=1)
        alike = (unit @ unit.T).tril(diagonal=-1) - torch.ones(len(unit), len(unit)).triu() * 2
        second, first = divmod(int(alike.argmax()), len(unit))
        pair = torch.tensor([first, second])
        mean = (vectors[pair] * members[pair]).sum(dim=0) / members[pair].sum()
        keep = torch.arange(len(vectors)) != second
        vectors = torch.where((torch.arange(len(vectors)) == first)[:, None], mean, vectors)[keep]
        members[first] += members[second]
        members = members[keep]
    return vectors
