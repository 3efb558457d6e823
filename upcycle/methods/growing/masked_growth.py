"""Masked structural growth (MSG): a wider or deeper dense model whose new parts are masked until training has unmasked them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from upcycle.architectures.dense.base import DenseConfig
from upcycle.architectures.dense.widened import (
    MASKS,
    WIDENED,
    GrownTensor,
    NewParts,
    WideSizes,
    widened_config,
)
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import CheckpointError, RefusalError, UsageError
from upcycle.methods.growing.base import CopiedExperts, DenseGrowth, Described, Grown, Piece, Promise
from upcycle.plugins import PluginParameters

if TYPE_CHECKING:
    from upcycle.recipe.conversion_recipe import Recipe


class MaskedGrowthParameters(PluginParameters):
    """Parameters of :class:`MaskedGrowth`; a size that is left out stays as it is."""

    hidden: int | None = Field(None, ge=1, description="the new hidden size")
    intermediate: int | None = Field(None, ge=1, description="the new number of neurons of an FFN")
    heads: int | None = Field(None, ge=1, description="the new number of attention heads, which keep their dimensions")
    layers: int | None = Field(None, ge=1, description="the new number of layers")
    placement: Literal["interpolated", "top"] = Field(
        "interpolated", description="where new layers go: behind those that they copy, or above all others"
    )
    std: float = Field(0.02, ge=0, description="standard deviation of new weights (norms begin at 1, biases at 0)")


class MaskedGrowth(DenseGrowth):
    """Implements masked structural growth (Yao et al., ICLR 2024, arXiv 2305.02869) of hidden size, FFN, heads and depth.

    Every tensor of the result has the source's as its first block, bit for bit; the rest is drawn. New layers are copies of old ones.
    In training, all that is new is multiplied by a mask that rises from 0 to 1 (:mod:`upcycle.models.growth_masks`; key ``masks``
    of a stage). At 0, the model computes what the source computes, whatever was drawn; at 1, it is the stock model in the
    folder. Verification measures the former. Until it was trained, the folder is refused by all other commands.

    The paper grows one dimension after the other, each by a conversion and a stage of training: FFN, then depth, hidden size, heads,
    and depth again. Here several can grow at once, which is as exact. New heads come with heads of keys and values of their own, as
    many as keep the ratio. Deviation: the paper also carries the optimizer's states over, and the learning rate's position; a
    run begins without states here, as after every conversion.
    """

    name = "masked_growth"
    title = "Masked structural growth (MSG)"
    paper = "https://arxiv.org/abs/2305.02869"
    next_step = "upcycle train masked_growth --model {out} --output RUN"
    Parameters = MaskedGrowthParameters
    parameters: MaskedGrowthParameters

    def layers(self, count: int) -> list[int]:
        """Return, for every layer of the result, the layer of the source (of ``count``) that it has or copies."""
        wanted = self.parameters.layers or count
        if self.parameters.placement == "top":
            return [*range(count), *(layer % count for layer in range(wanted - count))]
        return [layer * count // wanted for layer in range(wanted)]

    def promise(self, count: int) -> Promise:
        """Return ``exact``: what is measured has its new parts masked."""
        return "exact", "with all new parts masked, as training begins; training unmasks them"

    def grow(self, source: Described, recipe: Recipe, choice: CopiedExperts | None = None) -> Grown:
        """Describe the result.

        Raises:
            UsageError: nothing grows, or a size is smaller than the source's, or one that the stock class refuses.
            RefusalError: the function of such a model depends on its width otherwise.
        """
        from upcycle.checkpoints.find_family import family_of

        family = family_of(source.raw, source.where)
        if family.name not in WIDENED:
            raise RefusalError(
                f"masked_growth does not take a '{family.name}' model: its width is not only read through RMSNorms",
                hint=f"it takes {', '.join(WIDENED)}; depth_stack makes every text model deeper",
            )
        dense = family.config(source.raw)
        sizes, parts = self._sizes(dense), self._new(dense)
        deeper = super().grow(source, recipe, choice)
        config = widened_config(family, dense, deeper.config, sizes)
        try:
            wide = family.config(config)
        except CheckpointError as error:
            raise UsageError(
                f"no {family.name} model has these sizes: {error.message}", hint="choose other sizes"
            ) from None
        pieces, shapes = [], family.all_stored_specs(wide)
        for piece in deeper.pieces:
            made = {name: self._grown(name, o, shapes[name], source, recipe.seed) for name, o in piece.tensors.items()}
            pieces.append(Piece(piece.name, piece.layer, made))
        return replace(
            deeper,
            config=config,
            pieces=tuple(pieces),
            summary=_said(dense, wide),
            made={**deeper.made, MASKS: parts.as_dict()},
            hidden_size=wide.hidden_size,
            warnings=(),
        )

    def _sizes(self, dense: DenseConfig) -> WideSizes:
        """Return the new sizes.

        Raises:
            UsageError: one is smaller than the source's, or none is larger.
        """
        told, old = self.parameters, WideSizes.of(dense)
        before = {
            "hidden": old.hidden,
            "intermediate": old.intermediate,
            "heads": old.heads,
            "layers": dense.num_hidden_layers,
        }
        after = {key: getattr(told, key) or size for key, size in before.items()}
        smaller = next((key for key, size in before.items() if after[key] < size), None)
        if smaller:
            raise UsageError(
                f"{smaller}: {after[smaller]} is less than the source's {before[smaller]}",
                hint="growth makes nothing smaller: leave it out, or prune",
            )
        if after == before:
            raise UsageError(
                "masked_growth: nothing grows", hint="--param hidden=..., intermediate=, heads= or layers="
            )
        group = old.heads // old.key_heads
        if after["heads"] % group:
            raise UsageError(
                f"heads: {after['heads']} is no multiple of {group}, the heads that share one of keys and values",
                hint=f"--param heads={-(-after['heads'] // group) * group}",
            )
        return WideSizes(after["hidden"], after["intermediate"], after["heads"], after["heads"] // group)

    def _new(self, dense: DenseConfig) -> NewParts:
        sizes, old = self._sizes(dense), WideSizes.of(dense)
        seen: Counter[int] = Counter()
        new = []
        for index, layer in enumerate(self.layers(dense.num_hidden_layers)):
            if seen[layer]:
                new.append(index)
            seen[layer] += 1
        return NewParts(
            old.hidden if sizes.hidden > old.hidden else None,
            old.intermediate if sizes.intermediate > old.intermediate else None,
            old.heads if sizes.heads > old.heads else None,
            tuple(new),
        )

    def _grown(self, name: str, origin: Origin, shape: tuple[int, ...], source: Described, seed: int) -> Origin:
        if tuple(source.specs[origin.name].shape) == shape:
            return origin
        fill = None if len(shape) > 1 else 1.0 if "norm" in name else 0.0
        return GrownTensor(origin.name, shape=shape, part="grown", std=self.parameters.std, fill=fill, seed=seed)


def _said(dense: DenseConfig, wide: DenseConfig) -> str:
    """Return which sizes grew, in words."""
    changes: list[tuple[str, Any, Any]] = [
        (what, getattr(dense, key), getattr(wide, key))
        for what, key in (
            ("hidden size", "hidden_size"),
            ("neurons", "intermediate_size"),
            ("heads", "num_attention_heads"),
            ("layers", "num_hidden_layers"),
        )
    ]
    return ", ".join(f"{what} {new} from {old}" for what, old, new in changes if new != old)
