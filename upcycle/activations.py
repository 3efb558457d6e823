"""What one FFN does on the calibration tokens, streamed: neither the tokens nor their activations need fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from upcycle.errors import CheckpointError
from upcycle.feed_forward import FeedForward

HELD_OUT_EVERY = 8  # one batch in eight is kept from every fit and judges its strength


@dataclass(frozen=True)
class Inputs:
    """Some calibration tokens of one layer: fp32 ``x`` ``[t, d]`` (what the FFN and its router read), ``weight`` ``[t]``."""

    x: torch.Tensor
    weight: torch.Tensor
    held_out: bool


@dataclass(frozen=True)
class Batch:
    """:class:`Inputs` with fp32 ``hidden`` ``[t, F]``: ``act(gate x) * up x``, the input of the down projection, signed.

    ``weight`` ``[t]`` says how much a token's error counts (mean one): tokens whose residual stream is a thousand times
    longer than the others' would otherwise decide every sum of squares, and the next norm divides by that length.
    """

    x: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    held_out: bool


class Activations:
    """One layer's calibration tokens, to be passed over as often as needed.

    Args:
        ffn: the layer.
        inputs: starts a new pass over the tokens, always in the same batches.
        importance: fp32 ``[C, F]``, mean ``|h * dL/dh|`` of each text cluster, where gradients were collected.
        cache_bytes: activations up to this size are kept; above it every pass computes them again, to the same bits.
    """

    def __init__(
        self,
        ffn: FeedForward,
        inputs: Callable[[], Iterator[Inputs]],
        importance: torch.Tensor | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.ffn = ffn
        self.importance = importance
        self._inputs = inputs
        self._gate, self._up = ffn.gate.float(), ffn.up.float()
        self._act = activation_function(ffn.activation)
        self._cache: list[Batch] | None = []
        self._cache_bytes = cache_bytes

    @classmethod
    def of(cls, ffn: FeedForward, x: torch.Tensor, batch: int = 2048, **keys: torch.Tensor | None) -> Activations:
        """From tokens ``[T, d]`` in memory, all of weight one."""

        def inputs() -> Iterator[Inputs]:
            for number, piece in enumerate(x.float().split(batch)):
                held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
                yield Inputs(piece, torch.ones(len(piece)), held_out)

        return cls(ffn, inputs, **keys)  # type: ignore[arg-type]

    def batches(self) -> Iterator[Batch]:
        """One pass over all tokens.

        Raises:
            CheckpointError: an activation is not finite; the message names the layer and the neuron.
        """
        if self._cache:
            yield from self._cache
            return
        kept: list[Batch] | None = []
        held = 0
        for given in self._inputs():
            hidden = self._act(linear(given.x, self._gate)).mul_(linear(given.x, self._up))
            self._check(hidden)
            batch = Batch(given.x, hidden, given.weight, given.held_out)
            held += hidden.nbytes + given.x.nbytes
            kept = [*kept, batch] if kept is not None and held <= self._cache_bytes else None
            yield batch
        self._cache = kept or []

    def _check(self, hidden: torch.Tensor) -> None:
        low, high = hidden.aminmax()
        if bool(low.isfinite() & high.isfinite()):
            return
        neuron = int((~hidden.isfinite()).any(0).nonzero()[0])
        raise CheckpointError(
            f"layer {self.ffn.layer}, neuron {neuron}: the activation is not finite on the calibration text",
            hint="convert in the dtype the model was trained in, or use --calibration-mode parallel",
        )


def activation_function(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that ``hidden_act`` names in stock configurations."""
    from transformers.activations import ACT2FN

    function: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return function


def contributions(activations: Activations) -> torch.Tensor:
    """Fp64 ``[F]``: the weighted mean over tokens of ``(h_j * ||down_j||)^2``, the energy neuron j adds to the output."""
    norms = activations.ffn.down.double().square().sum(0)
    total = torch.zeros_like(norms)
    weights = 0.0
    for batch in activations.batches():
        total += batch.weight @ batch.hidden.square()
        weights += batch.weight.sum(dtype=torch.float64).item()
    return total * norms / weights
