"""DeepSeekMoE's layer from a dense FFN: some shards always on, replicas of the others routed."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.base import piece_size
from upcycle.methods.copying.virtual_groups import VirtualGroups, VirtualGroupsParameters, shards


class SharedPlusRoutedParameters(VirtualGroupsParameters):
    """Parameters of :class:`SharedPlusRouted`."""

    groups: bool = Field(
        True,
        description="one router row for all shards of a replica (false: a row each, as DeepSeekMoE has, not exact)",
    )


class SharedPlusRouted(VirtualGroups):
    """Fills the layer of DeepSeekMoE (Dai et al., arXiv 2401.06066) from a dense FFN.

    The FFN is cut into S + G shards of consecutive neurons. The first S are shared experts, always on at weight 1. The
    other G are routed, in E replicas: E * G routed experts. DeepSeekMoE-16B's layer (quarter-width experts, 2 shared, 6 of
    64 routed) is ``--shared 2 --param expansion=32 --param granularity=2 --top-k 6``.

    Exact where the G routed shards of a replica are chosen together: ``groups`` (one router row for them), top-k a multiple
    of G, weights that sum to 1, and scale G. With a row each (``groups=false``) it is exact only where all experts run at
    equal weight. ``gate=softmax`` (DeepSeekMoE's convention) takes scale ``E G^2 / T``, as in virtual groups.

    Deviations: the paper trains such a layer from scratch. Filling it from a dense FFN, router rows in groups, and the
    scale are ours, after arXiv 2410.07524. The shared shards are the first ones in stored order: as long as whole replicas
    run, it makes no difference which they are.
    """

    name = "shared_plus_routed"
    title = "Shared and routed shards"
    paper = "https://arxiv.org/abs/2401.06066"
    Parameters = SharedPlusRoutedParameters
    parameters: SharedPlusRoutedParameters

    def __init__(self, parameters: SharedPlusRoutedParameters) -> None:
        super().__init__(parameters)
        self.exact_with_any_router = parameters.groups

    def check(self, shape: MoeShape) -> None:
        """Refuse what virtual groups refuse; without groups no replica can be kept whole, and any top-k will do."""
        if self.parameters.groups:
            super().check(shape)
        else:
            self.check_form(shape)

    def inexact(self, shape: MoeShape, scale: float) -> str | None:
        """Name what virtual groups name, or that without groups the chosen experts are of different replicas."""
        if not self.parameters.groups and shape.top_k < shape.experts:
            return f"groups=false: {shape.top_k} of {shape.experts} routed experts run, of whatever replicas"
        return super().inexact(shape, scale)

    def tie(self, rows: torch.Tensor) -> torch.Tensor:
        """Return one row for all shards of a replica, or without groups the rows as they are."""
        return super().tie(rows) if self.parameters.groups else rows

    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> int:
        """Return ``F / (S + G)``, rounded up to a multiple of 8 when padding is allowed."""
        if not shared:
            raise UsageError(
                "shared_plus_routed needs shared experts, and there are none",
                hint="--shared 1, or --method virtual_groups",
            )
        granularity = self.parameters.granularity
        what = f"{shared} shared + granularity {granularity} = {shared + granularity} equal shards"
        return piece_size(intermediate_size, granularity, shared, pad, what)

    def blueprint(
        self,
        ffn: FeedForward,
        shape: MoeShape,
        scale: float,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> LayerBlueprint:
        """Make the first shards shared experts, and repeat the others E times."""
        everything, taken = torch.arange(ffn.intermediate_size), shape.shared * shape.expert_size
        shared = tuple(map(ExpertSpec, everything[:taken].split(shape.expert_size)))
        routed = shards(everything[taken:], self.parameters.granularity, shape.expert_size)
        replicas = routed * self.parameters.expansion
        return LayerBlueprint(ffn.layer, replicas, shape.top_k, scale, shared, spread=self.spread)
