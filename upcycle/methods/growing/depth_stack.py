"""Depth stacking (Gstack): the whole stack of layers, several times over."""

from __future__ import annotations

from pydantic import Field

from upcycle.methods.growing.base import DenseGrowth, Promise
from upcycle.plugins import PluginParameters


class DepthStackParameters(PluginParameters):
    """Parameters of :class:`DepthStack`."""

    growth: int = Field(4, ge=1, description="how many times the stack of layers stands one above the other")


class DepthStack(DenseGrowth):
    """Implements Gstack (Du et al., NeurIPS 2024, arXiv 2405.15319): layer ``i`` of the result is layer ``i mod L`` of the source.

    The stack is repeated as a whole, not every layer in its place. Embeddings, the final norm and the head are copied. The
    paper's factor is 4, after a short training of the small model (10 billion tokens in its runs); its optimum lies
    between 2 and 4. The function is not kept, by design: the loss jumps, and falls faster than from scratch.

    When to stack is not decided here: the paper's law is ``log10(d) = 0.88 log10(N) + 163.27 / log10(C) - 5.74``, with d the tokens
    that the small model is trained on, N the parameters of the large one without embeddings, and C the FLOPs of all training. The
    paper starts training with a fresh optimizer, which is up to the training that follows.
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
        if count == 1 and self.parameters.growth > 1:
            return ("a stack of one layer: the paper found that copies of a single layer do not learn",)
        return ()

    def promise(self, count: int) -> Promise:
        """Return ``exact`` for a single stack, which is the source; else ``approximate``."""
        growth = self.parameters.growth
        if growth == 1:
            return "exact", "growth=1 copies the model"
        return "approximate", f"the stack of {count} layers runs {growth} times: the loss jumps until it is trained"
