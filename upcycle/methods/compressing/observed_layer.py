"""What one pass over calibration text says about the experts of one layer. T tokens, E experts, K per token, S sampled tokens, d the
hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerObservations:
    """Describes the routed experts of one layer on the calibration text. All numbers are fp64 unless said otherwise.

    Attributes:
        tokens: ``[1]``, the number T of tokens that the layer read.
        load: ``[E]``, how many tokens chose each expert.
        weight: ``[E]``, the sum of its weights over the tokens that chose it.
        score: ``[E]``, the sum over all tokens of its share of the router's scores.
        norm: ``[E]``, the sum of ``||f_e(x)||`` over the tokens that chose it.
        saliency: ``[E]``, the sum of ``weight * ||f_e(x)||`` over the tokens that chose it.
        logits_gram: ``[E, E]``, the products of the experts' router logits, summed over all tokens.
        ratios: ``[101]``, percentiles of a token's second largest weight over its largest; zeros where K is 1.
        similarity: ``[1]``, the mean cosine of the stream before and behind the layer's experts.
        bias: ``[E]``, what the choice adds to the scores; zeros where it adds nothing.
        factor: ``[1]``, what the weights are multiplied by at the end.
        neurons: fp32 ``[E, F]``, the sum of ``(weight * activation)^2`` of every neuron over the tokens that chose its expert.
        neuron_gram: fp32 ``[E, F, F]``, the products of its neurons' activations, each times the weight, summed likewise; empty
            where there would be more than 16 million numbers.
        input_gram: fp32 ``[E, d, d]``, the products of the inputs of every expert, summed over the tokens that chose it; ``[1, d,
            d]``, over all tokens, where there would be more than 16 million numbers; empty where these are more, too.
        shared: fp32 ``[F']``, the sum over all tokens of ``(weight * activation)^2`` of the shared experts' neurons; empty: there are
            none.
        shared_weight: ``[1]``, the sum over all tokens of the shared experts' weight, 1 in most architectures.
        sample_logits: fp32 ``[S, E]``, router logits of tokens spread over the text.
        sample_weights: fp32 ``[S, E]``, the weights of their experts; 0 where one was not chosen.
        sample_gram: fp32 ``[S, E, E]``, for every sampled token the products of all experts' outputs on it.
        sample_inputs: fp32 ``[S, d]``, what the experts read of these tokens.
        mean_output: ``[E, d]``, every expert's mean output on the sampled tokens.
        gated_output: ``[E, d]``, the same with every output times the expert's share of the router's scores.
    """

    tokens: torch.Tensor
    load: torch.Tensor
    weight: torch.Tensor
    score: torch.Tensor
    norm: torch.Tensor
    saliency: torch.Tensor
    logits_gram: torch.Tensor
    ratios: torch.Tensor
    similarity: torch.Tensor
    bias: torch.Tensor
    factor: torch.Tensor
    neurons: torch.Tensor
    neuron_gram: torch.Tensor
    input_gram: torch.Tensor
    shared: torch.Tensor
    shared_weight: torch.Tensor
    sample_logits: torch.Tensor
    sample_weights: torch.Tensor
    sample_gram: torch.Tensor
    sample_inputs: torch.Tensor
    mean_output: torch.Tensor
    gated_output: torch.Tensor

    @property
    def experts(self) -> int:
        """The number E of routed experts."""
        return len(self.load)

    def some(self, first: int, count: int) -> LayerObservations:
        """Return the observations of the experts ``first`` to ``first + count - 1`` alone."""
        return _SomeExperts(self, slice(first, first + count))


_BY_EXPERT = (
    *("load", "weight", "score", "norm", "saliency", "bias", "neurons", "neuron_gram", "input_gram"),
    *("mean_output", "gated_output"),
)
_BY_TOKEN = ("sample_logits", "sample_weights")


class _SomeExperts(LayerObservations):
    """Takes those of some experts out of others whenever an attribute is asked for: these may be in a file."""

    def __init__(self, whole: LayerObservations, own: slice) -> None:
        object.__setattr__(self, "_whole", whole)
        object.__setattr__(self, "_own", own)

    def __getattr__(self, name: str) -> torch.Tensor:
        whole: LayerObservations = self.__dict__["_whole"]
        own: slice = self.__dict__["_own"]
        found: torch.Tensor = getattr(whole, name)
        if name in _BY_TOKEN:
            return found[:, own]
        if name == "logits_gram":
            return found[own, own]
        if name == "sample_gram":
            return found[:, own, own]
        of_each = name in _BY_EXPERT and len(found) == whole.experts  # Gram matrices may be of all tokens, or empty
        return found[own] if of_each else found
