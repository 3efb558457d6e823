"""Depth stacking (Gstack): the whole stack of layers, several times over."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from upcycle.methods.growing.base import CopiedExperts, DenseGrowth, Described, Grown, Promise
from upcycle.methods.growing.stacking_law import BEST, tokens_before_stacking, when_to_stack
from upcycle.plugins import PluginParameters

if TYPE_CHECKING:
    from upcycle.recipe.conversion_recipe import Recipe


class DepthStackParameters(PluginParameters):
    """Parameters of :class:`DepthStack`."""

    growth: int = Field(4, ge=1, description="how many times the stack of layers stands one above the other")
    budget: float | None = Field(
        None,
        gt=0,
        description="FLOPs of all training, small model and large: the plan then says after how many tokens the paper stacks",
    )


class DepthStack(DenseGrowth):
    """Implements Gstack (Du et al., NeurIPS 2024, arXiv 2405.15319): layer ``i`` of the result is layer ``i mod L`` of the source.

    The stack is repeated as a whole, not every layer in its place. Embeddings, the final norm and the head are copied. The
    paper's factor is 4, after a short training of the small model (10 billion tokens in its runs); its optimum lies
    between 2 and 4. The function is not kept, by design: the loss jumps, and falls faster than from scratch.

    When to stack: the paper's law (:func:`~upcycle.methods.growing.stacking_law.tokens_before_stacking`) tells after how many tokens
    of the small model, given ``budget``, the FLOPs of all training. The plan says so; nothing else depends on it. The paper starts
    training with a fresh optimizer, which is up to the training that follows.
    """

    name = "depth_stack"
    title = "Depth stacking (Gstack)"
    paper = "https://arxiv.org/abs/2405.15319"
    Parameters = DepthStackParameters
    parameters: DepthStackParameters

    def layers(self, count: int) -> list[int]:
        """Return ``i mod L`` for every layer ``i``."""
        return [i % count for i in range(self.parameters.growth * count)]

    def warnings(self, count: int) -> tuple[str, ...]:
        """Return what the paper found about such growth factors."""
        growth, found = self.parameters.growth, []
        if count == 1 and growth > 1:
            found.append("a stack of one layer: the paper found that copies of a single layer do not learn")
        if growth > BEST[1]:
            found.append(f"growth {growth}: the paper found its optimum between {BEST[0]} and {BEST[1]}")
        return tuple(found)

    def grow(self, source: Described, recipe: Recipe, choice: CopiedExperts | None = None) -> Grown:
        """Describe the result, and say when to stack if a budget is given."""
        grown, budget = super().grow(source, recipe, choice), self.parameters.budget
        if budget is None:
            return grown
        inside = [piece for piece in grown.pieces if piece.layer is not None]
        large = sum(source.specs[origin.name].elements for piece in inside for origin in piece.tensors.values())
        said, warnings = when_to_stack(large, large // self.parameters.growth, budget)
        return replace(
            grown,
            summary=f"{grown.summary}; {said}",
            made={**grown.made, "stacking": {"budget": budget, "tokens": tokens_before_stacking(large, budget)}},
            warnings=(*grown.warnings, *warnings),
        )

    def promise(self, count: int) -> Promise:
        """Return ``exact`` for a single stack, which is the source; else ``approximate``."""
        growth = self.parameters.growth
        if growth == 1:
            return "exact", "growth=1 copies the model"
        return "approximate", f"the stack of {count} layers runs {growth} times: the loss jumps until it is trained"
