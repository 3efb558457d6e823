"""Leaves out whole decoder layers, those that change the stream least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from upcycle.architectures.expert_terms import BlockCut
from upcycle.architectures.kept_layers import config_of_layers, needed_layers
from upcycle.architectures.stored_moe import MoeModel
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import UsageError
from upcycle.methods.compressing.base import Compression, CutSizes, kept_of
from upcycle.methods.compressing.described_cuts import Cut
from upcycle.methods.compressing.layer_source import LayerSource, ModelSource
from upcycle.methods.growing.base import Piece
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    import torch


class BlockDropParameters(PluginParameters):
    """Parameters of :class:`BlockDrop`."""

    pick: Literal["discrete", "consecutive"] = Field(
        "discrete",
        description="discrete: the layers that change the stream least; consecutive: the run of layers that does",
    )


class BlockDrop(Compression):
    """Implements Block Drop (He et al. 2024, arXiv 2406.02500, section 3.3): attention, experts and norms of a layer go together.

    The part ``keep`` of the decoder layers stays. With the stream h_l before layer l: ``discrete`` leaves out the n layers of the
    largest ``mean_t cos(h_l, h_{l+1})``, ``consecutive`` the run of n whose ``mean_t cos(h_l, h_{l+n})`` is the largest. Of equals the
    last go. One layer with experts always stays, and one with attention where others have none.

    Then the experts of every layer behind which, or before which, layers are gone are refitted: the layer's output is to be the
    uncut model's stream before the next layer that stays, so that it also does what the layers between did.

    Deviations: cosines are over sampled tokens of the calibration text. The paper does not refit; it trains or quantises.
    """

    name = "block_drop"
    title = "Fewer decoder layers (Block Drop)"
    paper = "https://arxiv.org/abs/2406.02500"
    depth = True
    Parameters = BlockDropParameters
    parameters: BlockDropParameters

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return the number of decoder layers of the result."""
        if recipe.keep is None:
            raise UsageError("block_drop needs to know how many decoder layers stay", hint="--keep 0.75")
        keep, least = round(recipe.keep * model.layers), min(map(len, _smallest(model, model.layers)))
        if keep < least or (keep == model.layers and recipe.keep < 1):
            most = (model.layers - 1) / model.layers
            raise UsageError(
                f"keep {recipe.keep:g} of {model.layers} decoder layers leaves {keep}"
                + (f", and {least} must stay" if keep < least else ""),
                hint=f"--keep {most:.4g}" if model.layers > least else "every layer of this model must stay",
            )
        return keep

    def sizes(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes of the result: only its layers are fewer."""
        return CutSizes(*CutSizes.of(model)[:3], layers=0 if keep == model.layers else keep)

    def undecided(self, model: MoeModel, keep: int) -> dict[int, Cut]:
        """Return the cut that leaves out the last layers that may go."""
        return _cuts(model, _chosen(model, keep, _last))

    def config(self, model: MoeModel, sizes: CutSizes, cuts: Mapping[int, Cut]) -> dict[str, Any]:
        """Return the configuration with fewer layers."""
        return config_of_layers(model, kept_of(cuts))

    def pieces(self, model: MoeModel, cuts: Mapping[int, Cut]) -> list[Piece]:
        """Return the tensors of the layers that stay, numbered anew."""
        paths, names = model.module_paths, model.names
        first = [name for name in names[None] if "embed" in name]
        pieces = [Piece("embeddings", None, {name: Origin(name) for name in first})]
        for place, layer in enumerate(kept_of(cuts)):
            old, new = f"{paths.layer(layer)}.", f"{paths.layer(place)}."
            tensors = {new + name.removeprefix(old): Origin(name) for name in names[layer]}
            pieces.append(Piece(f"layer {layer}", layer, tensors))
        rest = {name: Origin(name) for name in names[None] if name not in first}
        return [*pieces, Piece("final norm", None, rest)]

    def remarks(self, model: MoeModel, recipe: Recipe, keep: int) -> tuple[str, ...]:
        """Return that sizes are not known before layers are chosen, where layers differ."""
        kinds = {tuple(sorted(model.specs[name].shape for name in model.names[layer])) for layer in range(model.layers)}
        if len(kinds) == 1:
            return ()
        return ("layers differ in size: the sizes are those without the last layers, and others may be left out",)

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """Return what is gone, and what the result is."""
        gone = f"{model.layers - keep} of {model.layers} decoder layers are gone"
        return gone, f"{keep} layers from {model.layers}"

    def cut(self, source: LayerSource, keep: int) -> BlockCut:
        """Layers are not cut one by one, see :meth:`cuts`."""
        raise AssertionError("layers are left out together")

    def cuts(self, source: ModelSource, keep: int) -> dict[int, Cut]:
        """Decide which layers stay; see the class."""
        model = source.model
        return _cuts(model, dropped_layers(model, keep, source.observed.streams, self.parameters.pick))


def dropped_layers(model: MoeModel, keep: int, streams: torch.Tensor, pick: str) -> list[int]:
    """Return the layers that are left out, given the cosines ``[L + 1, L + 1]`` of the streams around them."""
    if pick == "consecutive":
        count = model.layers - keep
        runs, smallest = [list(range(first, first + count)) for first in range(keep + 1)], _smallest(model, keep)
        allowed = [run for run in runs if _may_go(run, model, smallest)]
        if not allowed:
            raise UsageError(
                f"no run of {count} layers can be left out: one with experts and one with attention must stay",
                hint="--param pick=discrete",
            )
        return max(allowed, key=lambda run: (float(streams[run[0], run[-1] + 1]), run[0]))
    order = sorted(range(model.layers), key=lambda layer: (-float(streams[layer, layer + 1]), -layer))
    return _chosen(model, keep, lambda _: order)


def _last(model: MoeModel) -> Iterable[int]:
    return reversed(range(model.layers))


def _chosen(model: MoeModel, keep: int, order: Callable[[MoeModel], Iterable[int]]) -> list[int]:
    """Return the first layers in an order that may go together."""
    gone: list[int] = []
    smallest = _smallest(model, keep)
    for layer in order(model):
        if len(gone) < model.layers - keep and _may_go([*gone, layer], model, smallest):
            gone.append(layer)
    return sorted(gone)


def _may_go(gone: Iterable[int], model: MoeModel, smallest: Iterable[set[int]]) -> bool:
    left = set(range(model.layers)) - set(gone)
    return any(one <= left for one in smallest)


def _smallest(model: MoeModel, keep: int) -> list[set[int]]:
    """Return sets of at most ``keep`` layers that would do: one of each kind that is needed."""
    return [one for each in itertools.product(*needed_layers(model)) if len(one := set(each)) <= keep]


def _cuts(model: MoeModel, gone: Iterable[int]) -> dict[int, Cut]:
    left_out = set(gone)
    return {layer: BlockCut(layer not in left_out) for layer in range(model.layers)}
