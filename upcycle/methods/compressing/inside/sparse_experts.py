"""Makes weights inside experts zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from upcycle.architectures.expert_terms import LayerCut
from upcycle.architectures.stored_moe import MoeModel
from upcycle.errors import UsageError
from upcycle.methods.compressing.base import Compression, CutSizes
from upcycle.methods.compressing.layer_source import ExpertTokens, LayerSource, Matrices
from upcycle.plugins import PluginParameters
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

_PARTS = 1000  # the share that is kept is counted in thousandths


class SparseExpertsParameters(PluginParameters):
    """Parameters of :class:`SparseExperts`."""

    update: Literal["sparse_gpt", "wanda"] = Field(
        "sparse_gpt",
        description="sparse_gpt: the weights that stay make up for those that go; wanda: they stay as they are",
    )
    pattern: Literal["2:4", "none"] = Field(
        "2:4", description="2:4: two of every four neighbours in a row stay (keep 0.5); none: any, the part keep"
    )


class SparseExperts(Compression):
    """Implements unstructured and 2:4 "expert slimming" (He et al. 2024, arXiv 2406.02500) with Wanda or SparseGPT.

    Every matrix of every expert gets zeros, chosen by the inputs of the tokens that chose the expert: gate and up by x, down by the
    activations times the router's weight (:mod:`upcycle.methods.compressing.inside.masks`). Where no token chose an expert, its
    smallest weights go.

    The zeros are stored as any number is: file, memory and speed are those of the whole model, unless an engine for 2:4 is given it.
    There is no refit of down, which would fill its zeros again: SparseGPT's update is that fit.

    Deviation: both papers prune a layer on the outputs of the pruned ones below it; here all read the whole model's.
    """

    name = "sparse_experts"
    title = "Zeros inside experts"
    paper = "https://arxiv.org/abs/2406.02500"
    Parameters = SparseExpertsParameters
    parameters: SparseExpertsParameters
    observes = False
    looks = True
    refits = False
    makes = frozenset({"gate", "up", "down"})

    def kept(self, model: MoeModel, recipe: Recipe) -> int:
        """Return how many thousandths of the weights stay."""
        if recipe.keep is None:
            raise UsageError("sparse_experts needs to know which part of the weights stays", hint="--keep 0.5")
        if recipe.keep == 1:
            return _PARTS
        if self.parameters.pattern == "2:4" and recipe.keep != 0.5:
            raise UsageError(
                f"keep {recipe.keep:g}: of the pattern 2:4, half of the weights stay",
                hint="--keep 0.5, or --param pattern=none",
            )
        for size in (model.hidden_size, model.expert_width):
            if self.parameters.pattern == "2:4" and size % 4:
                raise UsageError(
                    f"rows of {size} weights cannot be divided into fours, which 2:4 asks for",
                    hint="--param pattern=none",
                )
        return min(max(1, round(recipe.keep * _PARTS)), _PARTS - 1)

    def sizes(self, model: MoeModel, keep: int) -> CutSizes:
        """Return the sizes of the result, which do not change."""
        return CutSizes.of(model)

    def changed(self, model: MoeModel, keep: int) -> bool:
        """Return whether any weight becomes zero."""
        return keep < _PARTS

    def before(self, model: MoeModel, keep: int) -> LayerCut:
        """Return the cut that keeps every expert."""
        return LayerCut.keeping(range(model.experts))

    def said(self, model: MoeModel, keep: int) -> tuple[str, str]:
        """Return what is gone, and what the result is."""
        gone = f"{1 - keep / _PARTS:.1%} of the weights of every expert are zeros"
        pattern = ", two of every four neighbours" if self.parameters.pattern == "2:4" else ""
        return gone, f"{gone}{pattern if keep < _PARTS else ''}"

    def cut(self, source: LayerSource, keep: int) -> LayerCut:
        """Return the cut that keeps every expert."""
        return LayerCut.keeping(range(source.seen.experts))

    def made(
        self,
        cut: LayerCut,
        keep: int,
        rows: torch.Tensor,
        tokens: Callable[[int], ExpertTokens],
        matrices: Matrices,
    ) -> dict[str, torch.Tensor]:
        """Return the matrices of all experts, with zeros."""
        import torch

        from upcycle.methods.compressing.inside.masks import sparse_gpt, wanda

        zeroed = sparse_gpt if self.parameters.update == "sparse_gpt" else wanda
        share, grouped = keep / _PARTS, self.parameters.pattern == "2:4"
        gate_up, down = [], []
        for expert in range(len(rows)):
            seen, own = tokens(expert), matrices(expert)
            read = seen.x.double()
            active = (seen.weight[:, None] * seen.hidden).double()
            gate_up.append(torch.cat([zeroed(own[name], read.T @ read, share, grouped) for name in ("gate", "up")]))
            down.append(zeroed(own["down"], active.T @ active, share, grouped))
        return {"gate_up": torch.stack(gate_up).float(), "down": torch.stack(down).float()}
