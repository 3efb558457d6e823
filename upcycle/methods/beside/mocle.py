"""LoRA experts beside the linear layers of FFNs, chosen by the cluster of a text's instruction, or by each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from upcycle.methods.beside.base import BesideMethod
from upcycle.plugins import PluginParameters

if TYPE_CHECKING:
    from upcycle.models.own.adapted_ffn import AdaptedFfn


class MocleParameters(PluginParameters):
    """Parameters of :class:`Mocle`."""

    rank: int = Field(8, ge=1, description="rank of every LoRA expert")
    alpha: float = Field(16, gt=0, description="LoRA's alpha: what experts add is multiplied by alpha / rank")
    universal: bool = Field(
        True, description="one more expert runs for every token, with what the chosen one's weight lacks to 1"
    )
    router: Literal["clusters", "tokens"] = Field(
        "clusters",
        description="what chooses the expert: the cluster of a text's instruction (the paper), or each token by itself",
    )
    clusters: int = Field(16, ge=2, description="clusters of instructions (the paper: 64)")
    instruction: int = Field(32, ge=1, description="how many of a text's first tokens its instruction is")
    embedding: int = Field(32, ge=1, description="length of the learned vector of a cluster")
    temperature: float = Field(0.05, gt=0, description="what the router's logits are divided by")


class Mocle(BesideMethod):
    """Implements MoCLE (Gou et al. 2023, arXiv 2312.12379): instructions are clustered, and a cluster learns which LoRA expert it has.

    Beside every linear layer W of an FFN: ``y = W x + G B_e A_e x + (1 - G) B_u A_u x``. Here e is the expert of the largest
    ``softmax(R c / temperature)``, G its weight, c a learned vector of the cluster that the text's instruction is in, and u the
    universal expert. All B are zeros at first, so that the model begins as the dense one, and A are LoRA's uniform numbers.

    Clusters are those of k-means (k-means++, best of four starts) over the instructions of the calibration text.

    Deviations. The paper embeds an instruction by a sentence encoder; here it is the mean of the model's own token embeddings, so
    that the folder needs no second model. The instruction is a text's first ``instruction`` tokens, and a token among them is judged
    by those up to it: a text has the same experts whether it is read at once or written token by token. The paper adds noise to
    the logits in training, one for a whole text, and adapts attention, too: here is no noise, and FFNs alone are adapted.

    With ``router=tokens`` the router reads each token, and there are no clusters: token-conditional top-1.
    """

    name = "mocle"
    title = "LoRA experts per cluster of instructions"
    paper = "https://arxiv.org/abs/2312.12379"
    calibrated = True
    usual = (4, 1)
    Parameters = MocleParameters
    parameters: MocleParameters

    @property
    def clusters(self) -> int:
        """See :class:`~upcycle.methods.beside.base.BesideMethod`."""
        return self.parameters.clusters if self.parameters.router == "clusters" else 0

    @property
    def instruction(self) -> int:
        """See :class:`~upcycle.methods.beside.base.BesideMethod`."""
        return self.parameters.instruction

    def described(self, linears: tuple[str, ...], hidden: int, vocabulary: int, experts: int, top_k: int) -> AdaptedFfn:
        """See :class:`~upcycle.methods.beside.base.BesideMethod`."""
        from upcycle.models.own.adapted_ffn import AdaptedFfn
        from upcycle.models.own.routing.tempered import TemperedRule

        told = self.parameters
        return AdaptedFfn(
            paths=(),
            hidden_size=hidden,
            linears=linears,
            activation="",
            rank=told.rank,
            scale=told.alpha / told.rank,
            experts=experts,
            universal=told.universal,
            rule=TemperedRule(top_k, temperature=told.temperature),
            clusters=self.clusters,
            embedding=told.embedding if self.clusters else 32,
            vocabulary=vocabulary if self.clusters else 1,
            instruction=told.instruction if self.clusters else 32,
        )
