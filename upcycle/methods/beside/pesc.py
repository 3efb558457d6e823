"""Adapters as experts, behind FFNs that all experts share (PESC)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from upcycle.methods.beside.base import BesideMethod
from upcycle.plugins import PluginParameters

if TYPE_CHECKING:
    from upcycle.models.own.adapted_ffn import AdaptedFfn


class PescParameters(PluginParameters):
    """Parameters of :class:`Pesc`."""

    rank: int = Field(64, ge=1, description="neurons of every adapter")
    activation: Literal["silu", "gelu", "relu"] = Field("silu", description="the adapters' activation")


class Pesc(BesideMethod):
    """Implements parameter-efficient sparsity crafting (Wu et al. 2024, arXiv 2401.02731): one FFN with adapters behind it.

    Expert e is ``f(x) + U_e act(D_e f(x))`` with the same FFN f for all, so that a layer is
    ``f(x) + sum_e G_e U_e act(D_e f(x))`` with the top-2 of a softmax, divided by their sum. U are zeros at first: the model begins
    as the dense one, and the FFN runs once, however many experts a token has.

    Deviation: the paper trains LoRA on attention beside this; here that is a training recipe's matter.
    """

    name = "pesc"
    title = "Adapters as experts"
    paper = "https://arxiv.org/abs/2401.02731"
    next_step = "upcycle train pesc --model {out} --output {out}-tuned --set data=chat.jsonl"
    usual = (8, 2)
    Parameters = PescParameters
    parameters: PescParameters

    def described(self, linears: tuple[str, ...], hidden: int, vocabulary: int, experts: int, top_k: int) -> AdaptedFfn:
        """See :class:`~upcycle.methods.beside.base.BesideMethod`."""
        from upcycle.models.own.adapted_ffn import AdaptedFfn
        from upcycle.models.own.routing.top_k import TopKRule

        told = self.parameters
        return AdaptedFfn(
            (), hidden, (), told.activation, told.rank, 1.0, experts, False, TopKRule(top_k), vocabulary=1
        )
