"""What one FFN does on the calibration tokens, streamed: neither the tokens nor their activations need fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from upcycle.errors import CheckpointError
from upcycle.ffn.feed_forward import FeedForward

if TYPE_CHECKING:
    from upcycle.ffn.source_samples import Samples

_ROWS = 1024  # tokens whose activations are computed at once: few enough to stay near the processor
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
        tokens: how many there are.
        importance: fp32 ``[C, F]``, mean ``|h * dL/dh|`` of each text cluster, where gradients were collected.
        samples: which source's tokens they are, where a router is to tell several apart.
        cache_bytes: activations up to this size are kept; above it every pass computes them again, to the same bits.
        sources: the same layer of one of several mixed models, by its index, on that model's own states.

    Attributes:
        measured: what a method or router has found out about the layer, for the report.
    """

    def __init__(
        self,
        ffn: FeedForward,
        inputs: Callable[[], Iterator[Inputs]],
        tokens: int,
        importance: torch.Tensor | None = None,
        cache_bytes: int = 0,
        samples: Samples | None = None,
        sources: Callable[[int], Activations] | None = None,
    ) -> None:
        self.ffn = ffn
        self.samples = samples
        self.sources = sources
        self.measured: dict[str, float] = {}
        self.importance = importance
        self._inputs, self._tokens = inputs, tokens
        self._gate, self._up = ffn.gate.float(), ffn.up.float()
        self._act = activation_function(ffn.activation)
        self._cache: dict[int, Batch] = {}
        self._room = cache_bytes
        self._count: int | None = None  # of batches, once it is known

    @classmethod
    def of(cls, ffn: FeedForward, x: torch.Tensor, batch: int = 2048, **keys: Any) -> Activations:
        """From tokens ``[T, d]`` in memory, all of weight one."""

        def inputs() -> Iterator[Inputs]:
            for number, piece in enumerate(x.float().split(batch)):
                held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
                yield Inputs(piece, torch.ones(len(piece)), held_out)

        return cls(ffn, inputs, len(x), **keys)

    def inputs(self) -> Iterator[Inputs]:
        """One pass over what the FFN and its router read, without computing what is active."""
        return self._inputs()

    def batches(self) -> Iterator[Batch]:
        """One pass over all tokens.

        Raises:
            CheckpointError: an activation is not finite; the message names the layer and the neuron.
        """
        yield from self._some(lambda number, held_out: True)

    def some(self, tokens: int) -> Iterator[Batch]:
        """Whole batches of at least ``tokens`` tokens, if there are so many, evenly spread: enough for an estimate."""
        stride = max(1, self._tokens // tokens)
        # Shifted by one after each that is held out, or a stride of two would never meet one.
        yield from self._some(lambda number, held_out: (number + number // HELD_OUT_EVERY) % stride == 0)

    def judged(self) -> Iterator[Batch]:
        """The batches that a fit is judged by: those held out, or all if there are none."""
        found = False
        for batch in self._some(lambda number, held_out: held_out):
            found = True
            yield batch
        if not found:
            yield from self.batches()

    def drain(self) -> Iterator[tuple[Batch, bool]]:
        """One pass that gives up what is kept in memory, as it goes; says of every batch whether all were kept."""
        if len(self._cache) == self._count:
            for number in range(self._count):
                batch = self._cache.pop(number)
                self._room += batch.hidden.nbytes + batch.x.nbytes
                yield batch, True
        else:
            yield from ((batch, False) for batch in self.batches())

    def _some(self, wanted: Callable[[int, bool], bool]) -> Iterator[Batch]:
        """The batches of which ``wanted(number, held_out)`` is true; each is kept while there is room."""
        if len(self._cache) == self._count:
            numbered = ((number, self._cache[number]) for number in range(self._count))
            yield from (batch for number, batch in numbered if wanted(number, batch.held_out))
            return
        number = -1
        for number, given in enumerate(self._inputs()):
            if not wanted(number, given.held_out):
                continue
            batch = self._cache.get(number) or self._batch(given)
            size = batch.hidden.nbytes + batch.x.nbytes
            if number not in self._cache and size <= self._room:
                self._cache[number] = batch
                self._room -= size
            yield batch
        self._count = number + 1

    def _batch(self, given: Inputs) -> Batch:
        hidden = torch.empty(len(given.x), len(self._gate))
        for x, some in zip(given.x.split(_ROWS), hidden.split(_ROWS), strict=True):
            torch.mul(self._act(linear(x, self._gate)), linear(x, self._up), out=some)
        self._check(hidden)
        return Batch(given.x, hidden, given.weight, given.held_out)

    def _check(self, hidden: torch.Tensor) -> None:
        low, high = hidden.aminmax()
        if bool(low.isfinite() & high.isfinite()):
            return
        neuron = int((~hidden.isfinite()).any(0).nonzero()[0])
        raise CheckpointError(
            f"layer {self.ffn.layer}, neuron {neuron}: the activation is not finite on the calibration text",
            hint="convert in the dtype the model was trained in, or use --calibration-mode parallel",
        )


class Slots:
    """The tokens of an :class:`Activations` with other vectors in the place of ``hidden``: what is active in slots.

    The first pass takes over what the activations kept in memory, so that no more is kept than before.
    """

    def __init__(self, activations: Activations, active: Callable[[Batch], torch.Tensor]) -> None:
        self.layer = activations.ffn.layer
        self._activations, self._active = activations, active
        self._kept: list[Batch] = []

    def batches(self) -> Iterator[Batch]:
        """One pass over all tokens; ``hidden`` is ``[t, slots]``."""
        if self._kept:
            yield from self._kept
            return
        kept = []
        for batch, held in self._activations.drain():
            active = replace(batch, hidden=self._active(batch))
            kept += [active] if held else []
            yield active
        self._kept = kept


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
