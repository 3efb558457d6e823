"""Leaves out all experts of the layers whose experts change the stream least: a small FFN takes their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from upcycle.architectures.expert_terms import DenseCut, DenseMatrix, LayerCut
from upcycle.architectures.moe.dense_twin import width_beside
from upcycle.architectures.stored_moe import MoeModel
from upcycle.architectures.tensor_origin import Origin
from upcycle.errors import RefusalError, UsageError
from upcycle.methods.compressing.base import Compression, CutSizes
from upcycle.methods.compressing.described_cuts import Cut
from upcycle.methods.compressing.layer_source import LayerSource, ModelSource
from upcycle.methods.compressing.to_dense import of_best_neurons, stored_expert
from upcycle.methods.growing.base import Piece
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    pass

LISTED = ("mlp_only_layers", "mlp_layer_types")  # configuration keys that say of any layer whether it has experts
_WIDTH = "intermediate_size"  # of the FFNs of layers without experts
_OTHERWISE = ("cohere2_moe",)  # layers without experts attend in another way, too


class LayerDropParameters(PluginParameters):
    """Parameters of :class:`LayerDrop`."""

    width: int | None = Field(
        None, ge=1, description="the neurons of the FFNs in the place of experts; without it as many as one expert has"
    )


class LayerDrop(Compression):
    """Implements Layer Drop (He et al. 2024, arXiv 2406.02500, section 3.3): the MoE of a layer goes, attention stays.

    The part ``keep`` of the layers with experts keeps them. Those of the largest mean cosine of the stream before and behind the
    experts lose them; of equals the last. Stock classes have no layer without any FFN: one of ``width`` neurons (as many as one
    expert's, by default) takes the place of the experts, the routed and shared neurons that add most to the output, times their
    expert's mean weight. The refit then fits it, and the experts of the layers behind it, to the uncut model's stream.

    Only architectures whose configuration lists the layers without experts can hold the result: Qwen2-MoE, Qwen3-MoE, Mellum,
    Qwen3-VL-MoE.

    Deviations: the paper leaves nothing in the place of the experts, and takes the norm before them out, too; it does not refit.
    """

    name = "layer_drop"
    title = "Fewer layers with experts (Layer Drop)"
    paper = "https://arxiv.org/abs/2406.02500"
    mixes = True
    Parameters = LayerDropParameters
    parameters: LayerDropParameters

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return how many layers keep their experts."""
        layers = len(model.moe_layers)
        if recipe.keep is None:
            raise UsageError("layer_drop needs to know how many layers keep their experts", hint="--keep 0.75")
        keep = round(recipe.keep * layers)
        if recipe.keep == 1:
            return layers
        self._width(model)
        if not 1 <= keep < layers:
            raise UsageError(
                f"keep {recipe.keep:g} of {layers} layers with experts leaves {keep}",
                hint=f"--keep {(layers - 1) / layers:.4g}" if layers > 1 else "a model of one such layer keeps it",
            )
        return keep

    def _width(self, model: MoeModel) -> int:
        """Return the width of the FFNs in the place of experts.

        Raises:
            RefusalError: the architecture cannot have layers without experts where this would leave them.
            UsageError: it cannot have such FFNs.
        """
        stock = model.stock
        if model.family.name in _OTHERWISE or not any(hasattr(stock, key) for key in LISTED):
            first = ", but the first ones," if len(model.moe_layers) < model.layers else ""
            why = (
                "attend in another way where they have none"
                if model.family.name in _OTHERWISE
                else f"all{first} have experts: no key of config.json says which"
            )
            raise RefusalError(
                f"layer_drop leaves layers without experts, and the layers of a '{model.family.name}' model {why}",
                hint="--method block_drop leaves out whole layers",
            )
        neurons = model.experts * model.expert_width + min(width_beside(model, layer) for layer in model.moe_layers)
        own = {width_beside(model, layer) for layer in range(model.layers) if layer not in model.moe_layers}
        width = self.parameters.width or next(iter(own), min(model.expert_width, neurons))
        if own and width not in own:
            raise UsageError(
                f"width {width:,}: the layers that have no experts already have FFNs of {min(own):,} neurons, and all have one width",
                hint=f"--param width={min(own)}, or leave it out",
            )
        if width > neurons:
            raise UsageError(
                f"width {width:,} is larger than there are neurons in a layer: {neurons:,}",
                hint=f"--param width={neurons}",
            )
        return width

    def sizes(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes of the result: fewer layers have experts."""
        return CutSizes(*CutSizes.of(model)[:3], dense=len(model.moe_layers) - keep)

    def undecided(self, model: MoeModel, keep: int) -> dict[int, Cut]:
        """Return the cut that takes the experts out of the last layers that have some."""
        gone = model.moe_layers[keep:]
        return _cuts(model, {layer: DenseCut(self._width(model)) for layer in gone})

    def config(self, model: MoeModel, sizes: CutSizes, cuts: Mapping[int, Cut]) -> dict[str, Any]:
        """Return the configuration with the layers without experts listed."""
        config = super().config(model, sizes, cuts)
        widths = {layer: cut.width for layer, cut in cuts.items() if isinstance(cut, DenseCut)}
        if not widths:
            return config
        plain = sorted({*range(model.layers)} - {*model.moe_layers} | {*widths})
        changed: dict[str, Any] = {_WIDTH: max(widths.values())}
        if hasattr(model.stock, "mlp_only_layers"):
            changed |= {"mlp_only_layers": plain, "decoder_sparse_step": 1}
        else:
            changed["mlp_layer_types"] = ["dense" if layer in plain else "sparse" for layer in range(model.layers)]
        return model.family.with_text(config, changed)

    def pieces(self, model: MoeModel, cuts: Mapping[int, Cut]) -> list[Piece]:
        """Return every tensor of the result."""
        found = []
        for piece in super().pieces(model, cuts):
            cut = None if piece.layer is None else cuts.get(piece.layer)
            if isinstance(cut, DenseCut):
                assert piece.layer is not None
                found.append(Piece(piece.name, piece.layer, _dense_tensors(model, piece.layer, cut)))
            else:
                found.append(piece)
        return found

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """Return what is gone, and what the result is."""
        layers = len(model.moe_layers)
        gone = f"{layers - keep} of {layers} layers lost their experts, and have a small FFN in their place"
        return gone, f"{keep} layers with experts from {layers}"

    def cut(self, source: LayerSource, keep: int) -> DenseCut:
        """Layers are not cut one by one, see :meth:`cuts`."""
        raise AssertionError("layers are chosen together")

    def cuts(self, source: ModelSource, keep: int) -> dict[int, Cut]:
        """Decide which layers lose their experts; see the class."""
        layers, width = source.layers, self._width(source.model)
        order = sorted(layers, key=lambda layer: (-float(layers[layer].seen.similarity), -layer))
        dense = {layer: of_best_neurons(layers[layer], width) for layer in order[: len(order) - keep]}
        return _cuts(source.model, dense)


def _cuts(model: MoeModel, dense: Mapping[int, DenseCut]) -> dict[int, Cut]:
    return {layer: dense.get(layer, LayerCut.keeping(range(model.experts))) for layer in model.moe_layers}


def _dense_tensors(model: MoeModel, layer: int, cut: DenseCut) -> dict[str, Origin]:
    """Return the tensors of a layer with an FFN in the place of its experts."""
    block = f"{model.module_paths.block_of(layer)}."
    tensors: dict[str, Origin] = {name: Origin(name) for name in model.names[layer] if not name.startswith(block)}
    for part in ("gate", "up", "down"):
        stored = stored_expert(model, layer, part)
        source = model.form(stored)
        tensors[f"{block}{part}_proj.weight"] = DenseMatrix(stored, layer=layer, part=part, cut=cut, source=source)
    return tensors
