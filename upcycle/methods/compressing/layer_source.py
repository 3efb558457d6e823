"""What a method that compresses a Mixture-of-Experts may look at to decide a layer, and what tries its decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from upcycle.architectures.expert_terms import LayerCut

if TYPE_CHECKING:
    import torch

    from upcycle.methods.compressing.observations import LayerObservations

Matrices = Callable[[int], dict[str, "torch.Tensor"]]
"""Returns the matrices of an expert of one layer: gate and up ``[F, d]``, down ``[d, F]``, fp32.

``SHARED_FFN`` stands for the shared ones."""


@dataclass(frozen=True)
class ExpertTokens:
    """What an expert did with the t tokens that chose it: inputs ``x`` ``[t, d]``, activations ``hidden`` ``[t, F]``.

    ``weight`` ``[t]`` is the expert's; ``held`` ``[t]`` says which tokens judge fits, and belong in none.
    """

    x: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    held: torch.Tensor


@dataclass(frozen=True)
class LayerSource:
    """What a method may look at to cut one layer.

    Attributes:
        layer: its index.
        seen: what calibration text said of it.
        top_k: experts per token.
        normalized: whether the chosen experts' weights sum to 1.
        sigmoid: whether scores are sigmoids of the logits, and not their softmax.
        matrices: reads the matrices of an expert.
        seed: of random choices.
        activation: that of the experts, as configurations name it.
    """

    layer: int
    seen: LayerObservations
    top_k: int
    normalized: bool
    sigmoid: bool
    matrices: Matrices
    seed: int
    activation: str = "silu"


class Trial(Protocol):
    """Tries cuts of several layers together on text: see :class:`upcycle.calibration.compressing.try_cuts.CutTrial`."""

    def closest(self, options: Mapping[int, Sequence[LayerCut]]) -> dict[int, LayerCut]:
        """Return the combination of the next layers' cuts behind which the stream is closest to the uncut model's."""

    def loss(self, cuts: Mapping[int, LayerCut]) -> float:
        """Return the mean loss per token of the model with cuts of all its layers with experts."""
