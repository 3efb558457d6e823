"""Symphony-MoE: unlike fine-tunes become experts, their neurons in the order of one of them."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from upcycle.checkpoints.mixed_checkpoint import Mix
from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.feed_forward import FeedForward
from upcycle.methods.mixing.branch_train_mix import BranchTrainMix, BranchTrainMixParameters


class SymphonyParameters(BranchTrainMixParameters):
    """Parameters of :class:`Symphony`."""

    anchor: int = Field(0, ge=0, description="the source whose neurons all others are aligned to, counted from 0")
    fusion: Literal["slerp", "average"] = Field(
        "slerp", description="matrices of attention: interpolated on the sphere, or averaged as everything else is"
    )


class Symphony(BranchTrainMix):
    """Implements the first, training-free stage of Symphony-MoE (Wang, Peng and Yu, AAAI 2026, arXiv 2509.18542).

    It differs from :class:`~upcycle.methods.mixing.branch_train_mix.BranchTrainMix` in two things. Matrices of attention (or of
    what a family has in its place) are joined on the sphere, see :func:`~upcycle.checkpoints.slerp.slerp_coefficients`; embeddings,
    head, norms and biases are averaged. And every other source's neurons are put into the order of the anchor's: of all
    permutations the one with the largest sum of similarities between neurons in the same place, an assignment that is solved
    for every layer and source. The similarity of two neurons is the cosine of their activations over the calibration tokens;
    each model sees its own states on them.

    A permutation of all of an FFN's neurons changes nothing that the FFN computes. Whole experts are aligned for what comes
    after: averaging, merging or compressing them. With ``chunks=C`` it decides what is cut: chunk c of every source then
    holds the likes of the anchor's c-th run of neurons.

    Deviations. The paper fuses embeddings of the tokens that vocabularies share; here all sources have one vocabulary, which
    is checked. It calibrates on a twentieth of each source's training data: name such texts as the calibration. Its
    similarity and its way with more than two sources are not in what we have of it: cosine, and one source after another,
    are ours. FFNs of layers that stay dense are averaged in stored order. The second stage, training, is not done here.
    """

    name = "symphony"
    title = "Symphony-MoE"
    paper = "https://arxiv.org/abs/2509.18542"
    calibrated = True
    Parameters = SymphonyParameters
    parameters: SymphonyParameters

    def __init__(self, parameters: SymphonyParameters) -> None:
        super().__init__(parameters)
        self.slerp = parameters.fusion == "slerp"

    def join(self, mix: Mix | None) -> None:
        """Take at least two sources, one of which is the anchor."""
        super().join(mix)
        anchor, count = self.parameters.anchor, mix.count if mix else 0
        if anchor >= count:
            raise UsageError(
                f"anchor {anchor} is none of the {count} sources, which are counted from 0",
                hint=f"--param anchor={count - 1} is the last one",
            )

    def orders(self, ffn: FeedForward, activations: Activations | None) -> list[torch.Tensor]:
        """Return, per member, the neuron that takes the place of each of the anchor's neurons, int64 ``[F]``.

        Raises:
            UsageError: there are no activations.
        """
        if activations is None:
            raise UsageError(f"{self.name} needs calibration text", hint="--calibration demo, or a text file")
        everyone, anchor = torch.arange(ffn.intermediate_size), self.parameters.anchor
        if activations.sources is None:
            return super().orders(ffn, activations)
        orders = []
        sums = torch.zeros(2, dtype=torch.float64)
        models = [*self.members, *self.shared_members]
        for source in models:
            order = everyone
            if source != anchor:
                likeness = similarity(activations.sources(anchor), activations.sources(source))
                order = matched(likeness)
                sums += torch.stack([likeness[everyone, places].double().mean() for places in (everyone, order)])
            orders.append(order)
        stored, aligned = (sums / (len(models) - 1)).tolist()
        activations.measured |= {"similarity_stored": stored, "similarity_aligned": aligned}
        return orders


def similarity(one: Activations, other: Activations) -> torch.Tensor:
    """Return the cosine between each neuron of ``one`` and each of ``other`` over the same tokens, fp32 ``[F, F]``.

    A neuron that is silent on all tokens has similarity 0 with every other. Sums are taken batch by batch.
    """
    width = one.ffn.intermediate_size
    products, squares = torch.zeros(width, width), torch.zeros(2, width, dtype=torch.float64)
    for ours, theirs in zip(one.batches(), other.batches(), strict=True):
        products.addmm_(ours.hidden.T, theirs.hidden)
        squares += torch.stack([batch.hidden.double().square().sum(dim=0) for batch in (ours, theirs)])
    first, second = squares.rsqrt().float().nan_to_num(posinf=0.0)
    return products.mul_(first[:, None]).mul_(second)


def matched(likeness: torch.Tensor) -> torch.Tensor:
    """Return a different column for each row of ``likeness`` ``[F, F]``, int64 ``[F]``, with the largest sum of entries."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(likeness.double().neg_().numpy())[1])
