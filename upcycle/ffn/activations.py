"""The activations of one FFN on the calibration tokens, batch by batch: neither tokens nor activations need fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from upcycle.errors import CheckpointError, UsageError
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.neurons import Neurons

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
class TokenActivations:
    """:class:`Inputs` with fp32 ``hidden`` ``[t, F]``: the signed activations of all neurons, which the down projection reads.

    ``weight`` ``[t]`` says how much a token's error counts (mean one): tokens whose residual stream is a thousand times
    longer than the others' would otherwise decide every sum of squares, and the next norm divides by that length.
    """

    x: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    held_out: bool


class Activations:
    """One layer's calibration tokens, which can be passed over as often as needed.

    Args:
        ffn: the layer.
        inputs: starts a new pass over the tokens, always in the same batches.
        tokens: how many there are.
        importance: fp32 ``[C, F]``, mean ``|h * dL/dh|`` of each text cluster, where gradients were collected.
        cache_bytes: activations up to this size are kept; above it every pass computes them again, to the same bits.
        samples: which source each token belongs to, where a router is to tell sources apart.
        sources: returns the activations of the same layer of one of several mixed models, by its index, on that model's
            own states.

    Attributes:
        measured: numbers about the layer that a method or router adds for the report.
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
        self._neurons = Neurons(ffn)
        self._cache: dict[int, TokenActivations] = {}
        self._room = cache_bytes
        self._count: int | None = None  # of batches, once it is known

    @classmethod
    def of(cls, ffn: FeedForward, x: torch.Tensor, batch: int = 2048, **keys: Any) -> Activations:
        """Make activations of tokens ``x`` ``[T, d]`` in memory, all of weight one, ``batch`` at a time."""

        def inputs() -> Iterator[Inputs]:
            for number, piece in enumerate(x.float().split(batch)):
                held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
                yield Inputs(piece, torch.ones(len(piece)), held_out)

        return cls(ffn, inputs, len(x), **keys)

    def inputs(self) -> Iterator[Inputs]:
        """Pass once over what the FFN and its router read; no activation is computed."""
        return self._inputs()

    def batches(self) -> Iterator[TokenActivations]:
        """Pass once over all tokens.

        Raises:
            CheckpointError: an activation is not finite; the message names the layer and the neuron.
        """
        yield from self._some(lambda number, held_out: True)

    def some(self, tokens: int) -> Iterator[TokenActivations]:
        """Pass over evenly spread batches of at least ``tokens`` tokens together, or over all: enough for an estimate."""
        stride = max(1, self._tokens // tokens)
        # Shifted by one after every held-out batch, or an even stride would never meet one.
        yield from self._some(lambda number, held_out: (number + number // HELD_OUT_EVERY) % stride == 0)

    def judged(self) -> Iterator[TokenActivations]:
        """Pass over the batches that a fit is judged by: those held out, or all if there are none."""
        found = False
        for batch in self._some(lambda number, held_out: held_out):
            found = True
            yield batch
        if not found:
            yield from self.batches()

    def drain(self) -> Iterator[tuple[TokenActivations, bool]]:
        """Pass once over all tokens and drop what the cache holds on the way.

        Yields:
            Each batch, and whether the cache held all batches, so that a caller may keep as much in its place.
        """
        if len(self._cache) == self._count:
            for number in range(self._count):
                batch = self._cache.pop(number)
                self._room += batch.hidden.nbytes + batch.x.nbytes
                yield batch, True
        else:
            yield from ((batch, False) for batch in self.batches())

    def _some(self, wanted: Callable[[int, bool], bool]) -> Iterator[TokenActivations]:
        """Pass over the batches for which ``wanted(number, held_out)`` is true; each is cached while there is room."""
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

    def _batch(self, given: Inputs) -> TokenActivations:
        hidden = torch.empty(len(given.x), self.ffn.intermediate_size)
        for x, some in zip(given.x.split(_ROWS), hidden.split(_ROWS), strict=True):
            self._neurons.write(x, some)
        self._check(hidden)
        return TokenActivations(given.x, hidden, given.weight, given.held_out)

    def _check(self, hidden: torch.Tensor) -> None:
        low, high = hidden.aminmax()
        if bool(low.isfinite() & high.isfinite()):
            return
        neuron = int((~hidden.isfinite()).any(0).nonzero()[0])
        raise CheckpointError(
            f"layer {self.ffn.layer}, neuron {neuron}: the activation is not finite on the calibration text",
            hint="convert in the dtype the model was trained in, or use --calibration-mode parallel",
        )


class ExpertActivations:
    """The tokens of an :class:`Activations`, with the activations of all experts' neurons in the place of ``hidden``.

    A neuron that two experts hold appears twice, and one whose expert the router did not choose is zero. The first pass takes
    the cache of ``activations`` over, so that no more memory is held than before.

    Args:
        activations: the layer's tokens.
        active: makes fp32 ``[t, N]`` of a batch, N being the number of all experts' neurons.
    """

    def __init__(self, activations: Activations, active: Callable[[TokenActivations], torch.Tensor]) -> None:
        self.layer = activations.ffn.layer
        self._activations, self._active = activations, active
        self._kept: list[TokenActivations] = []

    def batches(self) -> Iterator[TokenActivations]:
        """Pass once over all tokens; ``hidden`` is ``[t, N]``."""
        if self._kept:
            yield from self._kept
            return
        kept = []
        for batch, held in self._activations.drain():
            active = replace(batch, hidden=self._active(batch))
            kept += [active] if held else []
            yield active
        self._kept = kept


def required(activations: Activations | None, method: str) -> Activations:
    """Return the activations that a calibrated method must have been given.

    Raises:
        UsageError: there are none.
    """
    if activations is None:
        raise UsageError(f"the method {method} looks at calibration text", hint="name some with --calibration")
    return activations


def contributions(activations: Activations) -> torch.Tensor:
    """Return fp64 ``[F]``: the weighted mean over tokens of ``(h_j * ||down_j||)^2``, the energy neuron j adds to the output."""
    norms = activations.ffn.down.double().square().sum(0)
    total = torch.zeros_like(norms)
    weights = 0.0
    for batch in activations.batches():
        total += batch.weight @ batch.hidden.square()
        weights += batch.weight.sum(dtype=torch.float64).item()
    return total * norms / weights


def most_contributing(activations: Activations, count: int) -> torch.Tensor:
    """Return int64 ``[count]``, ascending: the neurons of the largest :func:`contributions`, of equal ones the first."""
    order = contributions(activations).argsort(descending=True, stable=True)
    return order[:count].sort().values
