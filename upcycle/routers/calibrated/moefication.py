"""MoEfication's trained selector: two layers that tell which experts' neurons are active."""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from upcycle.ffn.activations import TokenActivations
from upcycle.ffn.blueprint import LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.router_capture import ExpertMap
from upcycle.ffn.router_network import RouterForm, RouterNetwork
from upcycle.routers.calibrated.centroid import weight_centres
from upcycle.routers.calibrated.hidden_layer import Examples, HiddenLayerRouter, TrainingParameters, initial

_JUDGED_SHARE = 0.2  # of the experts


class MoeficationParameters(TrainingParameters):
    """Parameters of :class:`MoeficationRouter`."""


class MoeficationRouter(HiddenLayerRouter):
    """The selector of MoEfication (arXiv 2110.01786): ``W2 tanh(W1 x)`` for x of length one, without biases.

    ``W1`` ``[E, d]`` starts from the experts' centres, the means of their L2-normalised first-layer rows, and ``W2`` ``[E, E]``
    from the identity. The target of expert i is ``s_i`` over the largest of all tokens and experts of a step, where ``s_i`` is
    the sum of its neurons' activations; the loss is binary cross-entropy, averaged over the experts; Adam at 0.01, steps of
    512 tokens, 30 epochs. The epoch is taken whose choices of 20% of the experts have the largest share of the mass that the
    best choices have, on tokens kept from training; the start is one of them. Its logits order the experts, which weigh 1 each:
    ``routing: {rule: top_k, scores: ones, normalized: false}``.

    Deviations: ``s_i`` sums ``|h_j|``, which is the same for ReLU; the products of gated FFNs have both signs. One batch of the
    calibration text in eight judges, where the paper keeps a tenth of the tokens. The rate falls along half a cosine.
    """

    name = "moefication"
    title = "MoEfication's selector"
    paper = "https://arxiv.org/abs/2110.01786"
    Parameters = MoeficationParameters
    parameters: MoeficationParameters

    def form(self, experts: int) -> RouterForm:
        """Return a hidden neuron for every expert, with tanh, and inputs of length one."""
        return RouterForm(experts, "tanh", unit_inputs=True)

    def targets(self, batch: TokenActivations, experts: ExpertMap) -> torch.Tensor:
        """Return fp32 ``[t, E]``: how active the experts' neurons are together."""
        return batch.hidden.abs() @ experts.matrix(torch.ones_like(experts.norms))

    def start(
        self, blueprint: LayerBlueprint, ffn: FeedForward, form: RouterForm, rng: torch.Generator
    ) -> RouterNetwork:
        """Return the experts' centres, and the identity; random rows for experts that are all the same."""
        centres = weight_centres(blueprint, ffn).float()
        if bool((centres == centres[0]).all()):  # the same k would be chosen for every token
            centres = initial(form.width, ffn.hidden_size, rng)
        return RouterNetwork(torch.eye(form.width), centres, form)

    def losses(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return cross-entropies ``[t, E]`` with targets ``[t, E]`` relative to the largest of them."""
        relative = target / target.max().clamp(min=torch.finfo(target.dtype).tiny)
        return binary_cross_entropy_with_logits(logits, relative, reduction="none")

    def merit(self, logits: torch.Tensor, examples: Examples) -> float:
        """Return the share of the largest mass that a fifth of the experts can have."""
        count = max(1, round(_JUDGED_SHARE * logits.shape[1]))
        chosen = examples.y.gather(1, logits.topk(count, dim=1).indices)
        both = torch.stack([part.sum(1).double() for part in (chosen, examples.y.topk(count, dim=1).values)])
        mine, oracle = (both @ examples.weight.double()).tolist()
        return mine / oracle if oracle else 1.0
