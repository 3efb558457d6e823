"""What one pass over calibration text says about the experts of a Mixture-of-Experts, and the file that it is kept in.

T tokens, E experts, K per token, S sampled tokens, d the hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.parsing import parse_json

if TYPE_CHECKING:
    import torch

    from upcycle.progress import Progress

OBSERVATIONS_FILE = "observations.safetensors"
FEW_TOKENS = 32  # below that, an expert's numbers say little
MOST_STREAMS = 32_000_000  # numbers of streams behind all layers that are in memory while a model is observed
MOST_OUTPUTS = 2**25  # numbers of all experts' outputs on sampled tokens that are
MOST_GRAM = 2**24  # numbers in the products of neurons, or of inputs, that are kept of one layer
_FORMAT = "3"
AGAIN = "upcycle observe MOE FILE --calibration TEXT"
STREAMS = "streams"
PER_EXPERT = ("load", "weight", "score", "norm", "saliency", "logits_gram", "bias", "mean_output", "gated_output")


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


@dataclass(frozen=True)
class Observations:
    """Describes a whole model: its layers with experts, and which model and text they belong to.

    Attributes:
        layers: the observations, by layer.
        model: the fingerprint of the weights.
        top_k: experts per token.
        text: what ``upcycle.json`` says of the text.
        streams: fp64 ``[L + 1, L + 1]``, the mean cosine of the stream before every layer, and behind the last, with each other one
            of these, on sampled tokens.
    """

    layers: Mapping[int, LayerObservations]
    model: str
    top_k: int
    text: dict[str, Any]
    streams: torch.Tensor

    def about_file(self) -> dict[str, str]:
        """Return what a file of these observations says of itself."""
        about = {"upcycle": "observations", "format": _FORMAT, "model": self.model, "top_k": str(self.top_k)}
        return {**about, "text": json.dumps(self.text)}

    @staticmethod
    def about(path: Path) -> dict[str, Any]:
        """Return what the file says of itself, without its numbers: ``model``, ``top_k`` and ``text``.

        Raises:
            UsageError: there is no such file, or it holds something else.
            CheckpointError: it is damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise UsageError(f"observations: {path} is not there", hint=f"{AGAIN} makes it")
        try:
            with safe_open(path, "pt") as file:
                found = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error})", hint=AGAIN) from None
        if found.get("upcycle") != "observations" or found.get("format") != _FORMAT:
            raise UsageError(f"{path} holds no observations of this version", hint=AGAIN)
        try:
            return {
                "model": found["model"],
                "top_k": int(found["top_k"]),
                "text": dict(parse_json(found["text"], str(path))),
            }
        except (CheckpointError, KeyError, ValueError, TypeError):
            raise CheckpointError(f"{path}: what it says of itself is damaged", hint=AGAIN) from None

    @classmethod
    def read(cls, path: Path) -> Observations:
        """Open a file of observations, whose numbers are read when they are asked for.

        Raises:
            UsageError: there is no such file, or it holds something else.
            CheckpointError: it is damaged.
        """
        from upcycle.methods.compressing.observations_file import StoredLayers

        about, layers = cls.about(path), StoredLayers(path)
        streams = layers.tensor(STREAMS) if layers.has(STREAMS) else None
        if streams is None or streams.dim() != 2 or len({*streams.shape}) != 1:
            raise CheckpointError(f"{path}: '{STREAMS}' is not whole", hint=AGAIN)
        return cls(layers, about["model"], about["top_k"], about["text"], streams)


def noted(seen: Observations, progress: Progress) -> Observations:
    """Return the same observations; experts of which the text says little are counted, for the user to see."""
    unused = sum(int((found.load == 0).sum()) for found in seen.layers.values())
    few = sum(int((found.load < FEW_TOKENS).sum()) for found in seen.layers.values())
    if few:
        progress.note(
            f"{few} experts were chosen by fewer than {FEW_TOKENS} tokens of the text, {unused} of them by none: what is said of "
            "them is a guess, and more text, or text of more kinds, tells (--calibration-tokens)"
        )
    return seen
