"""Branch-Train-MiX: fine-tunes of one model become the experts, and everything else is their average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from upcycle.checkpoints.mixed_checkpoint import Mix
from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.moe_shape import MoeShape
from upcycle.methods.base import Scale, piece_size
from upcycle.methods.copying.base import Copies, CopiesParameters, seeded
from upcycle.methods.copying.virtual_groups import shards, tied_rows
from upcycle.methods.mixing.base import MixingMethod
from upcycle.recipe.recipe_parts import SourceRecipe


class BranchTrainMixParameters(CopiesParameters):
    """Parameters of :class:`BranchTrainMix`."""

    rest: Literal["average", "base"] = Field(
        "average", description="all but the experts: the weighted mean of the sources, or the recipe's source's own"
    )
    generalist: bool = Field(
        False, description="one more expert: the FFN of the recipe's source, which joins the average"
    )
    chunks: int = Field(1, ge=1, description="experts that every source's FFN is cut into")
    noise: float = Field(
        0.0,
        ge=0,
        description="normal noise on every expert's gate, up and down, as a fraction of each matrix's standard deviation",
    )
    tied: bool = Field(True, description="one router row for the chunks of a source: they are chosen together")


class BranchTrainMix(MixingMethod, Copies):
    """Implements Branch-Train-MiX (Sukhbaatar et al., arXiv 2403.07816).

    Expert i is source i's FFN. Everything else is the arithmetic mean of the sources, summed in fp64; ``weight`` of a
    source counts there alone. The generalist, the model that the sources were branched from, is one expert more and has
    weight 1 in the mean. With ``chunks=C`` every FFN is cut into C runs of neurons (the paper's splitting): expert
    ``m * C + c`` is chunk c of source m, times C, as weights that sum to 1 average what belongs together. Two sources run
    per token, so top-k is 2C unless the recipe says otherwise; more experts than there are chunks repeat all of them.

    A source may be ``shared``: its FFN is then always on, and added to the weighted sum of the routed ones. ``scale`` multiplies
    what a source's expert adds, ``noise`` of a source is the absolute deviation of noise on its expert.

    Nothing is preserved: attention is averaged and the experts differ. Sources that hold the same numbers are copies of one
    model, and that is exact.

    Deviations. The paper's chunks have router rows of their own; here those of a source share one (``tied=false`` for the
    paper's), without which no token sees a whole FFN before training. Of its other routers, Switch's is ``--top-k 1``, trained
    with a capacity factor of 1.5, and soft routing is a top-k of all experts; Sample-Top-1 is ``control.choice: sample`` of
    ``upcycle train`` with one expert per token, and takes the most probable one afterwards. ``rest=base``, ``noise``, shared
    sources and their scales are not in the paper: they are mergekit's.
    """

    name = "branch_train_mix"
    title = "Branch-Train-MiX"
    paper = "https://arxiv.org/abs/2403.07816"
    takes_roles = True
    Parameters = BranchTrainMixParameters
    parameters: BranchTrainMixParameters

    def __init__(self, parameters: BranchTrainMixParameters) -> None:
        super().__init__(parameters)
        self.draws = parameters.noise > 0
        self.exact_when_all_active = not self.draws

    def join(self, mix: Mix | None) -> None:
        """Take at least two sources."""
        if mix is None or mix.count < 2:
            raise UsageError(
                f"{self.name} mixes several sources, and there is one",
                hint="--sources A,B,C, or --method sparse_upcycling for copies of one model",
            )
        if self.parameters.generalist and mix.base < mix.count:
            raise UsageError(
                "generalist=true adds the recipe's source as an expert, and it is one of the sources already",
                hint="set 'source' to the model that the sources were branched from, or leave generalist out",
            )
        self.mix = mix
        if len(self.members) < 2:
            raise UsageError(
                f"{self.name} routes between several sources, and {len(self.members)} of {mix.count} are not 'shared'",
                hint="leave 'shared: true' out of some",
            )
        self.draws = self.parameters.noise > 0 or any(source.noise for source in mix.recipes)
        self.exact_when_all_active = mix.alike and not self.draws and not any(source.role for source in mix.recipes)

    @property
    def members(self) -> list[int]:
        """The index of the model whose FFN each routed expert is, before it is cut into chunks."""
        if self.mix is None:
            return []
        routed = [source for source in range(self.mix.count) if source not in self.shared_members]
        return [*routed, *([self.mix.base] if self.parameters.generalist else [])]

    @property
    def shared_members(self) -> list[int]:
        """The indices of the sources that the recipe calls shared."""
        return [i for i, source in enumerate(self.mix.recipes) if source.shared] if self.mix else []

    @property
    def shared_experts(self) -> int:
        """The number of shared experts: all chunks of every shared source."""
        return len(self.shared_members) * self.parameters.chunks

    def source_scale(self, member: int) -> float:
        """Return the recipe's scale for a member; 1 for the generalist."""
        return self._recipe_of(member).scale

    def _recipe_of(self, member: int | None) -> SourceRecipe:
        """Return the recipe's entry for a member; a default one for the generalist, or where there are no sources."""
        recipes = self.mix.recipes if self.mix else ()
        return recipes[member] if member is not None and member < len(recipes) else SourceRecipe(name="?")

    @property
    def experts_only(self) -> bool:
        """Whether only FFNs are read from sources other than the base: with ``rest=base``, unless activations are compared."""
        return self.parameters.rest == "base" and not self.calibrated

    @property
    def rest(self) -> tuple[float, ...] | None:
        """The weights of the models in the mean of all tensors outside experts; None: those tensors are the base's."""
        if self.mix is None or self.parameters.rest == "base":
            return None
        return (*self.mix.weights, float(self.parameters.generalist))

    @property
    def _group(self) -> int:
        return self.parameters.chunks if self.parameters.tied else 1

    def sizes(self, experts: int | None, top_k: int | None) -> tuple[int, int]:
        """Return one expert per source and chunk, or a multiple of that, and a top-k of two sources."""
        chunks, members = self.parameters.chunks, max(1, len(self.members))
        count = members * chunks if experts is None else experts
        if count % (members * chunks):
            what = f"{members} models" + (f" in {chunks} chunks" if chunks > 1 else "")
            raise UsageError(
                f"{self.name} makes {members * chunks} experts of {what}, or a multiple of that, not {experts}",
                hint=f"leave --experts out, or --experts {members * chunks}",
            )
        return count, 2 * chunks if top_k is None else top_k

    def check(self, shape: MoeShape) -> None:
        """Refuse a top-k that runs a part of a source, and a down bias that the scale of chunks cannot make up for."""
        if self.parameters.chunks > 1:
            self.refuse_lost_bias(shape)
        if shape.top_k % self._group:
            raise UsageError(
                f"top-k {shape.top_k} is not a multiple of chunks {self._group}: a source's FFN would run in part",
                hint=f"--top-k {max(1, round(shape.top_k / self._group)) * self._group}, or --param tied=false",
            )

    def inexact(self, shape: MoeShape, scale: float) -> str | None:
        """Name the sources that differ, their roles, or chunks that are chosen one by one."""
        if self.mix is not None and not self.mix.alike:
            rest = (
                "their average around them"
                if self.parameters.rest == "average"
                else "the source's own layers around them"
            )
            return f"experts of {len(self.members)} different models, {rest}; compared with the model 'source'"
        roles = [
            f"{source.name} has '{source.role}'" for source in (self.mix.recipes if self.mix else ()) if source.role
        ]
        if roles:
            return f"{roles[0]}: the layer is not the average of the sources' FFNs"
        if self.draws:
            return f"every expert has noise of {self.parameters.noise:g} of its weights' standard deviation"
        if self._group != self.parameters.chunks and shape.top_k < shape.experts:
            return f"tied=false: {shape.top_k} of {shape.experts} chunks run, of whatever sources"
        return super().inexact(shape, scale)

    def tie(self, rows: torch.Tensor) -> torch.Tensor:
        """Return one row for all chunks of a source, or with ``tied=false`` the rows as they are."""
        return rows if self._group == 1 else tied_rows(rows, self._group, self.name)

    def expert_size(self, intermediate_size: int, experts: int, shared: int, pad: bool) -> int:
        """Return ``F / C``, rounded up to a multiple of 8 when padding is allowed."""
        if shared != self.shared_experts:
            raise UsageError(
                f"{self.name} has {self.shared_experts or 'no'} shared experts, not {shared}: a recipe's sources say 'shared: true'",
                hint="leave --shared out, and say it of sources in a recipe",
            )
        chunks = self.parameters.chunks
        return (
            intermediate_size
            if chunks == 1
            else piece_size(intermediate_size, chunks, 0, pad, f"{chunks} equal chunks")
        )

    def scale(self, convention: Scale, experts: int, top_k: int, shared: int = 0) -> float:
        """Return ``C``; with the softmax's own weights ``E C / T``, as in virtual groups."""
        super().scale(convention, experts, top_k, shared)
        chunks = float(self.parameters.chunks)
        return chunks if self.normalized or chunks == 1 else experts * chunks / top_k

    def orders(self, ffn: FeedForward, activations: Activations | None) -> list[torch.Tensor]:
        """Return, per member, its neurons in the order in which they are cut, int64 ``[F]``; here, as they are stored.

        Shared members come last. Without sources, which a conversion always has, there is one order, for ``ffn``.
        """
        return [torch.arange(ffn.intermediate_size)] * max(1, len(self.members) + len(self.shared_members))

    def blueprint(
        self,
        ffn: FeedForward,
        shape: MoeShape,
        scale: float,
        rng: torch.Generator,
        activations: Activations | None = None,
    ) -> LayerBlueprint:
        """Return the chunks of every source, in order, repeated where there are more experts than chunks."""
        whose: list[int | None] = [*self.members, *self.shared_members] or [None]

        def pieces(source: int | None, order: torch.Tensor) -> Iterator[ExpertSpec]:
            said = self._recipe_of(source)
            for piece in shards(order, self.parameters.chunks, shape.expert_size):
                yield replace(piece, source=source, scale=said.scale, noise=said.noise)

        every = [spec for pair in zip(whose, self.orders(ffn, activations), strict=True) for spec in pieces(*pair)]
        cut = len(every) - shape.shared
        draws = seeded(rng, noise=self.parameters.noise) if self.draws else None
        routed = tuple(every[:cut]) * (shape.experts // cut)
        return LayerBlueprint(ffn.layer, routed, shape.top_k, scale, tuple(every[cut:]), draws=draws)
