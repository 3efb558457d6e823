"""Co-activation graph: the graph of neurons that are active together, cut where that loses least."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch.nn.functional import one_hot

from upcycle.errors import EnvironmentFault
from upcycle.ffn.activations import Activations, required
from upcycle.ffn.feed_forward import FeedForward
from upcycle.plugins import PluginParameters
from upcycle.splitters.grouping.greedy_assignment import greedy_assignment
from upcycle.splitters.grouping.neuron_profiles import coactivation, draw_seed
from upcycle.splitters.grouping.plain_sum import PlainSumPartition

# A little less than 1, so that the edge at the percentile itself is kept, with weight one.
_MARGIN = 0.99


class CoactivationGraphParameters(PluginParameters):
    """Parameters of :class:`CoactivationGraph`."""

    threshold: float = Field(
        1.0, ge=0, description="a neuron is active where |h| exceeds this many times the token's root mean square"
    )
    clip_tokens: int = Field(8, ge=0, description="clip co-activation, summed over so many tokens, at 1; 0: never")
    percentile: int = Field(
        10, ge=0, le=100, description="co-activation below it is no edge; raised by tens while it is 0"
    )
    rebalance: Literal["affinity", "random"] = Field(
        "affinity", description="which neurons leave too large parts: those tied least to them, or any"
    )


class CoactivationGraph(PlainSumPartition):
    """MoEfication's co-activation graph split (arXiv 2110.01786), also in LLaMA-MoE's code.

    Nodes are neurons; an edge weighs ``w_nm = sum_t |h_n(t)| |h_m(t)|`` over the tokens on which both are active. As in
    the released code the sum over every ``clip_tokens`` = 8 tokens is clipped at 1, the matrix is divided by 0.99 times
    its first percentile among 10, 20, ... that is not zero, edges below 1 are dropped and weights cut to integers. METIS
    (k-way, as ``gpmetis``) cuts the graph into parts of nearly equal size; neurons then move from too large parts to too
    small ones, so that sizes differ by at most one.

    Deviations: the activations of a gated FFN are signed and never zero, where the paper has ReLU's: magnitudes are
    taken, and only above ``threshold`` times the token's root mean square. ``h`` is the input of the down projection
    (LLaMA-MoE: the output of up). Tokens count by their weight. A last group of fewer than 8 tokens is not dropped, and
    groups end with a batch. METIS's seed changes with the layer. The neurons that move are not random: those whose
    co-activation inside their part exceeds that with the best part that has room by the least, and each goes where it is
    co-active most (``rebalance: random`` is the paper's way). Chosen experts are summed without weights, so the ``paper``
    scale is ``sum`` = K.

    Cost: clipping passes over an F x F matrix for every 8 tokens, without it (``clip_tokens: 0``) there is one product per
    batch. Memory: F x F fp32 three times, and 16 bytes for each edge; a higher ``percentile`` keeps fewer.
    """

    name = "coactivation_graph"
    title = "Co-activation graph cut"
    paper = "https://arxiv.org/abs/2110.01786"
    calibrated = True
    Parameters = CoactivationGraphParameters
    parameters: CoactivationGraphParameters

    def labels(
        self,
        neurons: torch.Tensor,
        experts: int,
        ffn: FeedForward,
        rng: torch.Generator,
        activations: Activations | None,
    ) -> torch.Tensor:
        """Cut the graph and make its parts equal.

        Raises:
            EnvironmentFault: pymetis is not installed.
        """
        metis = load_metis()  # before the long pass over the text
        chosen = self.parameters
        weights = coactivation(required(activations, self.name), neurons, chosen.threshold, chosen.clip_tokens)
        weights = (weights + weights.T) / 2  # METIS needs both directions to the last bit
        parts = cut(metis, weights, experts, draw_seed(rng), chosen.percentile)
        return rebalanced(parts, weights, experts, rng if chosen.rebalance == "random" else None)


def load_metis() -> Any:
    """Import the optional package pymetis.

    Raises:
        EnvironmentFault: it is not installed.
    """
    try:
        return import_module("pymetis")
    except ImportError:
        raise EnvironmentFault(
            "the method coactivation_graph needs METIS",
            hint="pip install pymetis, or use --method coactivation_kmeans",
        ) from None


def cut(metis: Any, weights: torch.Tensor, parts: int, seed: int, percentile: int) -> torch.Tensor:
    """Return int64 ``[M]``: METIS's cut of the graph with co-activation ``weights`` ``[M, M]`` into parts of about M / parts."""
    dense = weights.numpy()
    tried = np.percentile(dense, range(percentile, 101, 10))
    # A graph without any co-activation has no edges, and every cut of it is as good.
    scaled = dense / (tried[tried > 0][0] * _MARGIN if (tried > 0).any() else 1.0)
    np.fill_diagonal(scaled, 0)
    kept = scaled >= 1
    edges = np.flatnonzero(kept)
    kind = metis.zero_copy_dtype()
    starts = np.concatenate([[0], kept.sum(axis=1).cumsum()]).astype(kind)
    # METIS adds weights up in integers of its own, which must not overflow.
    most = np.iinfo(kind).max // max(len(edges), 1)
    found = metis.part_graph(
        parts,
        metis.CSRAdjacency(starts, (edges % len(dense)).astype(kind)),
        eweights=np.minimum(scaled.ravel()[edges], most).astype(kind),
        recursive=False,
        options=metis.Options(seed=seed),
    )
    return torch.tensor(found.vertex_part, dtype=torch.int64)


def rebalanced(
    labels: torch.Tensor, weights: torch.Tensor, parts: int, rng: torch.Generator | None = None
) -> torch.Tensor:
    """Move as few points as possible until sizes differ by at most one; the largest parts keep the extra point.

    Args:
        labels: int64 ``[M]`` in ``0..parts-1``.
        weights: ``[M, M]``, what two points in the same part are worth; the diagonal does not count.
        parts: how many.
        rng: move random points instead of those that lose least.
    """
    counts = torch.bincount(labels, minlength=parts)
    size, extra = divmod(len(labels), parts)
    wanted = torch.full_like(counts, size)
    wanted[counts.argsort(descending=True, stable=True)[:extra]] += 1
    surplus, room = (counts - wanted).clamp(min=0), (wanted - counts).clamp(min=0)
    if rng is None:
        worth = weights @ one_hot(labels, parts).to(weights.dtype)
        worth[torch.arange(len(labels)), labels] -= weights.diagonal()
    else:
        worth = torch.rand(len(labels), parts, generator=rng)
    loss = worth.gather(1, labels[:, None]).squeeze(1) - worth.masked_fill(room == 0, -torch.inf).amax(dim=1)
    order = loss.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]  # by part, within it by loss
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    leaving = place < surplus[labels]
    moved = labels.clone()
    moved[leaving] = greedy_assignment(worth[leaving], room)
    return moved
