"""What one pass over calibration text says about the experts of a Mixture-of-Experts, and what tells whose they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.parsing import parse_json
from upcycle.methods.compressing.observations_file import AGAIN, StoredLayers
from upcycle.methods.compressing.observed_layer import LayerObservations

if TYPE_CHECKING:
    import torch

    from upcycle.progress import Progress

OBSERVATIONS_FILE = "observations.safetensors"
FEW_TOKENS = 32  # below that, an expert's numbers say little
MOST_STREAMS = 32_000_000  # numbers of streams behind all layers that are in memory while a model is observed
MOST_OUTPUTS = 2**25  # numbers of all experts' outputs on sampled tokens that are
MOST_GRAM = 2**24  # numbers in the products of neurons, or of inputs, that are kept of one layer
STREAMS = "streams"
_FORMAT = "3"


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
