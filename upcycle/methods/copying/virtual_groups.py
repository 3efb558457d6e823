"""Virtual groups: replicas of the dense FFN, each cut into shards that the router chooses together."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import DOWN_ONLY, ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.base import Scale, balanced_blocks, filled, piece_size
from upcycle.methods.copying.base import Copies, CopiesParameters

_TOLD_APART = 2.0**-8  # bfloat16's unit roundoff: rows that are closer than this may round to the same numbers
_SPREADS = {"down": DOWN_ONLY, "up_down": (0.0, 1 / 2, 1 / 2), "paper": (1 / 3, 1 / 3, 1 / 3)}


class VirtualGroupsParameters(CopiesParameters):
    """Parameters of :class:`VirtualGroups`."""

    expansion: int = Field(2, ge=1, description="replicas of the FFN; there are expansion * granularity routed experts")
    granularity: int = Field(
        4, ge=1, description="routed experts that one replica is cut into; top-k is a multiple of it"
    )
    scale_placement: Literal["down", "up_down", "paper"] = Field(
        "down",
        description="where the weight scale goes: down and up_down (its root) keep the function, paper (its cube root on gate, up and "
        "down) does not, and in long training its paper found it better than down",
    )
    partial: bool = Field(False, description="allow a top-k that splits a replica (not exact)")


class VirtualGroups(Copies):
    """Implements virtual groups (He et al., NVIDIA, "Upcycling Large Language Models into Mixture of Experts", arXiv 2410.07524).

    Expert ``g * G + s`` is shard ``s`` of replica ``g``: F/G consecutive neurons. The G shards of a replica have one router
    row, so they are chosen together and weigh the same; with weights that sum to 1 and ``T = n G`` of them chosen, their
    weighted sum is 1/G of the dense FFN, which the weight scale makes up for.

    - ``gate=normalized`` (top-k, then softmax): scale ``G``. Exact with any router, on ``down`` or on ``up_down``.
    - ``gate=softmax`` (softmax, then top-k): scale ``E G^2 / T``, right where all experts weigh the same and approximate elsewhere.
      In the paper it trains better than top-k then softmax, throughout.

    ``scale_placement=paper`` is the authors' equal split: the cube root on gate, up and down. It is exact for an FFN without a
    gate and with squared ReLU; for a gated FFN it is not, because ``silu(a z) != a silu(z)``: the error is reported. The paper
    found the scale on one matrix to train worse than the split. Without a gate, a factor on up passes through the activation:
    only those placements are taken that multiply the output by the scale (``down``; ``up_down`` for ReLU, ``paper`` for
    squared ReLU).

    The defaults (``normalized``, ``down``) start from the dense function, which is not what the paper trains: that is the recipe
    ``upcycle_cpt``. docs/measured/virtual_groups_demo.md has both on the demo model, where after a short training the
    exact start is ahead.

    Deviations: the default placement (above); a width that G does not divide is padded with zero neurons where allowed.
    Replicas whose logits tie (in bfloat16 that happens) can be split by the top-k of the modelling code, as in the paper.
    """

    name = "virtual_groups"
    title = "Virtual groups"
    paper = "https://arxiv.org/abs/2410.07524"
    Parameters = VirtualGroupsParameters
    parameters: VirtualGroupsParameters

    def __init__(self, parameters: VirtualGroupsParameters) -> None:
        super().__init__(parameters)
        self.spread = _SPREADS[parameters.scale_placement]
        self.exact_when_all_active = parameters.scale_placement != "paper"

    def sizes(self, experts: int | None, top_k: int | None) -> tuple[int, int]:
        """Return ``E G`` experts, and one replica per token unless the recipe says otherwise."""
        expansion, granularity = self.parameters.expansion, self.parameters.granularity
        wanted = expansion * granularity
        if experts not in (None, wanted):
            raise UsageError(
                f"{self.name} makes expansion {expansion} * granularity {granularity} = {wanted} experts, not {experts}",
                hint="leave --experts out, or change --param expansion=... and --param granularity=...",
            )
        return wanted, granularity if top_k is None else top_k

    def check(self, shape: MoeShape) -> None:
        """Refuse a top-k that splits a replica, unless that is allowed, and what the FFN's form makes meaningless."""
        self.check_form(shape)
        granularity = self.parameters.granularity
        if shape.top_k % granularity and not self.parameters.partial:
            raise UsageError(
                f"top-k {shape.top_k} is not a multiple of granularity {granularity}: some shards of a replica would run "
                "without the others",
                hint=f"--top-k {max(1, round(shape.top_k / granularity)) * granularity}, or --param partial=true (not exact)",
            )

    def check_form(self, shape: MoeShape) -> None:
        """Refuse a scale that would not come out of the activation, and a down bias that the scale cannot make up for.

        Raises:
            UsageError: the FFN has no gate and the placement needs one, or ``gate=softmax`` would shrink its down bias.
        """
        self.refuse_lost_bias(shape)
        if not shape.form.gated and not shape.form.scales_output(self.spread):
            raise UsageError(
                f"scale_placement={self.parameters.scale_placement} puts a factor on up, and without a gate it would pass through "
                f"the activation {shape.form.activation}",
                hint="--param scale_placement=down",
            )

    def inexact(self, shape: MoeShape, scale: float) -> str | None:
        """Name a split replica, the paper's placement where it changes the function, or weights that do not sum to 1."""
        granularity = self.parameters.granularity
        if shape.top_k % granularity:
            return f"top-k {shape.top_k} is not a multiple of granularity {granularity}: a replica runs in part"
        if shape.form.gated and not self.exact_when_all_active and scale != 1:
            return (
                f"scale_placement=paper multiplies the gate by {scale ** (1 / 3):.3g} = {scale:g}^(1/3), and its activation "
                "does not scale with it (down is exact)"
            )
        return super().inexact(shape, scale)

    def tie(self, rows: torch.Tensor) -> torch.Tensor:
        """Return one row for all shards of a replica: that of its first, bit for bit.

        Raises:
            UsageError: two replicas' rows are as good as equal (closer than bfloat16 tells apart): they would tie, and
                the top-k would split them.
        """
        return tied_rows(rows, self.parameters.granularity, self.name)

    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> int:
        """Return ``F / G``, rounded up to a multiple of 8 when padding is allowed."""
        self.refuse_shared(shared, "all shards of a replica are routed")
        granularity = self.parameters.granularity
        return piece_size(intermediate_size, granularity, 0, pad, f"granularity = {granularity} equal shards")

    def scale(self, convention: Scale, experts: int, top_k: int, shared: int = 0) -> float:
        """Return ``G``, or ``E G^2 / T`` where weights are not renormalised; ``paper`` and ``exact`` are the same."""
        super().scale(convention, experts, top_k, shared)
        granularity = float(self.parameters.granularity)
        return granularity if self.normalized else experts * granularity / top_k

    def blueprint(
        self,
        ffn: FeedForward,
        shape: MoeShape,
        scale: float,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> LayerBlueprint:
        """Cut the FFN into shards and repeat them E times."""
        routed = shards(torch.arange(ffn.intermediate_size), self.parameters.granularity, shape.expert_size)
        return LayerBlueprint(ffn.layer, routed * self.parameters.expansion, shape.top_k, scale, spread=self.spread)


def shards(neurons: torch.Tensor, count: int, size: int) -> tuple[ExpertSpec, ...]:
    """Cut ``neurons`` into ``count`` runs whose lengths differ by at most one, filled up to ``size`` with zero neurons."""
    labels = balanced_blocks(len(neurons), count)
    return tuple(ExpertSpec(filled(neurons[labels == s], size)) for s in range(count))


def tied_rows(rows: torch.Tensor, size: int, method: str) -> torch.Tensor:
    """Return ``rows`` ``[E, d]`` with those of every group of ``size`` experts replaced by its first, bit for bit.

    Raises:
        UsageError: two groups' rows are as good as equal (closer than bfloat16 tells apart): they would tie, and the top-k
            would split them.
    """
    tied = rows[::size]
    apart = torch.pdist(tied.double())
    if len(tied) > 1 and apart.min() <= _TOLD_APART * tied.norm(dim=1).max():
        raise UsageError(
            f"{method} needs another router row for every replica, and this router gives equal neurons equal rows",
            hint="--router random or --router cool",
        )
    return tied.repeat_interleave(size, dim=0)
