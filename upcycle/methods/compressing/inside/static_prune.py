"""Static pruning: a smaller dense model, every FFN of which keeps the neurons that contribute most on the calibration text."""

from __future__ import annotations

from typing import NoReturn

import torch

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations, most_contributing, required
from upcycle.ffn.blueprint import ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.base import Method, Scale


class StaticPrune(Method):
    """Prunes neurons and refits, in the order of Channel Pruning (He, Zhang and Sun, ICCV 2017, arXiv 1707.06168).

    As there, a layer's inputs are chosen first, and its weights are then fitted by least squares to what the dense layer puts
    out, on the outputs of the pruned layers below, so that errors do not add up. It is the honest rival of a split: the same
    neurons run for every token, without a router, and the result is a dense model of the same family. The kept neurons become
    one shared expert, which is then stored as the family's own FFN.

    Deviations: a neuron is kept for its energy, the mean over tokens of ``(h_j * ||down_j||)^2``, where the paper solves a LASSO;
    neurons of a FFN take the place of a convolution's channels. `refit: blocks` also trains gate and up, which the paper does not.
    """

    name = "static_prune"
    title = "Static pruning"
    paper = "https://arxiv.org/abs/1707.06168"
    kind = "pruning"
    calibrated = True
    exact_when_all_active = False

    def inexact(self, shape: MoeShape, scale: float) -> str:
        """Return that a part of every FFN is missing."""
        return "a pruned FFN is smaller"

    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> NoReturn:
        """Refuse to divide the FFN.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.name} makes a smaller dense model, and no experts",
            hint="upcycle convert MODEL OUT --method static_prune --active 0.5 --calibration docs.txt",
        )

    def scale(self, convention: Scale, experts: int, top_k: int, shared: int = 0) -> float:
        """Return 1: there is no routed expert to scale."""
        return 1.0

    def blueprint(
        self,
        ffn: FeedForward,
        shape: MoeShape,
        scale: float,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> LayerBlueprint:
        """Keep the ``shape.expert_size`` neurons that contribute most, in their stored order; nothing is random."""
        kept = most_contributing(required(activations, self.name), shape.expert_size)
        return LayerBlueprint(ffn.layer, (), 0, scale, (ExpertSpec(kept),))
