"""What a method that compresses a Mixture-of-Experts may look at to decide a layer, and what tries its decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from upcycle.architectures.expert_terms import LayerCut

if TYPE_CHECKING:
    import torch

    from upcycle.architectures.stored_moe import MoeModel
    from upcycle.methods.compressing.observations import Observations
from upcycle.methods.compressing.observed_layer import LayerObservations

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
        jitter: SparseMixer's noise, where routers weigh by it.
        clamp: of GPT-OSS's activation, the factor inside the sigmoid and the largest number; None: the activation is that one.
    """

    layer: int
    seen: LayerObservations
    top_k: int
    normalized: bool
    sigmoid: bool
    matrices: Matrices
    seed: int
    activation: str = "silu"
    jitter: float | None = None
    clamp: tuple[float, float] | None = None

    def hidden(self, matrices: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return the activations ``[T, F]`` of an expert's neurons for inputs ``[T, d]``; ``matrices`` are its, and its biases.

        With a clamp (a, m) they are ``(up + 1) g sigmoid(a g)``, gate g clamped to at most m, up to at most m either way.
        """
        from upcycle.ffn.neurons import activation_function

        gate, up = x @ matrices["gate"].T, x @ matrices["up"].T
        if self.clamp is None:
            made: torch.Tensor = activation_function(self.activation)(gate) * up
            return made
        factor, most = self.clamp
        gate = (gate + matrices["gate_bias"]).clamp(max=most)
        up = (up + matrices["up_bias"]).clamp(-most, most)
        return (up + 1) * gate * (factor * gate).sigmoid()

    def some(self, first: int, count: int) -> LayerSource:
        """Return what may be seen of some of the experts that lie side by side, as if there were no others."""
        return replace(self, seen=self.seen.some(first, count), matrices=lambda expert: self.matrices(first + expert))

    def output(self, matrices: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Return an expert's output ``[T, d]`` likewise, before it is weighted."""
        made = self.hidden(matrices, x) @ matrices["down"].T
        return made + matrices["down_bias"] if "down_bias" in matrices else made


class Trial(Protocol):
    """Tries cuts of several layers together on text: see :class:`upcycle.calibration.compressing.try_cuts.CutTrial`."""

    def closest(self, options: Mapping[int, Sequence[LayerCut]]) -> dict[int, LayerCut]:
        """Return the combination of the next layers' cuts behind which the stream is closest to the uncut model's."""

    def loss(self, cuts: Mapping[int, LayerCut]) -> float:
        """Return the mean loss per token of the model with cuts of all its layers with experts."""


@dataclass(frozen=True)
class ModelSource:
    """What a method may look at to cut all layers.

    Attributes:
        model: the MoE.
        seen: what calibration text said of it; None: the method reads no observations.
        matrices: returns what reads the matrices of a layer's experts.
        seed: of random choices.
        store: takes the tensors of a layer that no stored one is, of a method that is ``factored``.
        trial: tries cuts on text, for a method that :attr:`~upcycle.methods.compressing.base.Compression.tries`.
    """

    model: MoeModel
    seen: Observations | None
    matrices: Callable[[int], Matrices]
    seed: int
    store: Callable[[int, dict[str, torch.Tensor]], None]
    trial: Trial | None = None

    @property
    def observed(self) -> Observations:
        """What calibration text said of it, for methods that read it."""
        assert self.seen is not None
        return self.seen

    @property
    def layers(self) -> dict[int, LayerSource]:
        """What is to be seen of each layer."""
        return {
            layer: LayerSource(
                layer=layer,
                seen=seen,
                top_k=self.model.top_k,
                normalized=self.model.normalized,
                sigmoid=self.model.sigmoid,
                matrices=self.matrices(layer),
                seed=self.seed,
                activation=self.model.activation,
                jitter=self.model.jitter,
                clamp=self.model.clamp,
            )
            for layer, seen in self.observed.layers.items()
        }
