"""Norm router: two layers that predict the norm of every expert's output (D2DMoE)."""

from __future__ import annotations

import torch
from pydantic import Field

from upcycle.ffn.activations import TokenActivations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.router_capture import ExpertMap
from upcycle.ffn.router_network import RouterForm, RouterNetwork
from upcycle.routers.calibrated.hidden_layer import Examples, HiddenLayerRouter, TrainingParameters, initial


class NormParameters(TrainingParameters):
    """Parameters of :class:`NormRouter`."""

    width: int = Field(128, ge=1, description="neurons of the hidden layer (D2DMoE: 128, for Gemma 512)")
    learning_rate: float = Field(3e-3, gt=0, description="Adam's highest learning rate (D2DMoE: 1e-3, for GPT-2 3e-3)")


class NormRouter(HiddenLayerRouter):
    """The router of D2DMoE (arXiv 2310.04361): ``|W2 relu(W1 x)|``, without biases, as near to ``||E_i(x)||_2`` as it learns to be.

    The loss is the mean squared error over experts and tokens; expert i's output is that of its neurons, without the FFN's down
    bias. Trained for rule ``dynamic_k``, which compares the predictions.

    Deviations: every layer's router is trained for itself, on the inputs of the dense FFN, where the paper's code trains all at
    once: with the backbone frozen and all experts on these are the same inputs, and no router sees another. Norms are learnt as
    multiples of their mean, inputs as multiples of their root mean square, and both factors go into the weights. The rate falls
    along half a cosine, and the epoch with the smallest error on tokens kept from training is taken.
    """

    name = "d2d_norms"
    title = "Predicted output norms"
    paper = "https://arxiv.org/abs/2310.04361"
    predicts_norms = True
    Parameters = NormParameters
    parameters: NormParameters

    def form(self, experts: int) -> RouterForm:
        """Return ``width`` hidden neurons with ReLU, and an absolute value at the end."""
        return RouterForm(self.parameters.width, "relu", absolute=True)

    def targets(self, batch: TokenActivations, experts: ExpertMap) -> torch.Tensor:
        """Return fp32 ``[t, E]``: the norms of the experts' outputs."""
        return experts.output_norms(batch.hidden)

    def unit(self, examples: Examples) -> float:
        """Return the mean norm."""
        return max(examples.y.double().mean().item(), torch.finfo(torch.float32).tiny)

    def start(
        self, blueprint: LayerBlueprint, ffn: FeedForward, form: RouterForm, rng: torch.Generator
    ) -> RouterNetwork:
        """Return random matrices."""
        hidden = initial(form.width, ffn.hidden_size, rng)
        return RouterNetwork(initial(len(blueprint.routed), form.width, rng), hidden, form)

    def losses(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return squared errors ``[t, E]``."""
        return (logits - target).square()

    def merit(self, logits: torch.Tensor, examples: Examples) -> float:
        """Return the mean squared error, negative."""
        return -float(self.losses(logits, examples.y).mean(1).double() @ examples.weight.double())
