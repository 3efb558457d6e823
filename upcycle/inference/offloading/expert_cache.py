"""Keeps the experts that were used last: one least-recently-used cache per layer, and buffers for experts that are on their way.

The caches are those of Eliseev & Mazur, *Fast inference of Mixture-of-Experts language models with offloading* (arXiv 2312.17238):
every layer has as many places; an expert that was fetched ahead waits in a buffer that all layers share, so that a wrong guess
evicts nothing, and takes the place of the layer's least recently used expert when it is used (the two exchange their buffers).

**Deviations.** Recency counts tokens, not the order of computation: of a prompt, whose experts are computed one by one, those stay
that its last tokens chose. What the layer still needs in the same pass is evicted only when there is nothing else, and then what it
needs last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from upcycle.inference.offloading.loading import ExpertLoad, Loader

# Given layer, expert and buffer, returns what fills the buffer, on whatever thread.
BufferReader = Callable[[int, int, torch.Tensor], Callable[[], None]]


@dataclass(eq=False)  # one is another only if it is the same: tensors have no one answer
class Held:
    """An expert in a buffer; ``used`` is the token that last chose it, with a running number for those of one token."""

    buffer: torch.Tensor
    load: ExpertLoad
    used: tuple[int, int] = (-1, -1)
    guessed: bool = False


@dataclass
class Counts:
    """How experts were found when a layer needed them: in memory, fetched ahead by a guess, or in the file."""

    hits: int = 0
    guessed: int = 0
    misses: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.hits + self.guessed + self.misses


@dataclass
class _Layer:
    places: int
    free: list[torch.Tensor]
    held: dict[int, Held] = field(default_factory=dict)
    needed: dict[int, int] = field(
        default_factory=dict
    )  # what this pass still needs: expert -> last token that chose it
    current: int | None = None
    first: int = 0  # number of the pass's first token
    tokens: int = 0  # that the layer has read


class ExpertCache:
    """Gives the bytes of experts, layer by layer. One thread calls it; loads run on those of ``loader``.

    All buffers are made at once: no more memory is ever used.

    Args:
        places: how many experts every layer keeps, at least 1.
        ahead: how many experts can be on their way beside them.
        make: makes a buffer for the largest expert, where it is computed.
        read: prepares to fill a buffer with an expert.
        loader: runs loads.
    """

    def __init__(
        self,
        places: Sequence[int],
        ahead: int,
        make: Callable[[], torch.Tensor],
        read: BufferReader,
        loader: Loader,
    ) -> None:
        self._layers = [_Layer(number, [make() for _ in range(number)]) for number in places]
        self._spare = [make() for _ in range(ahead)]
        self._ahead: dict[tuple[int, int], Held] = {}
        self._left: list[Held] = []  # guessed wrong, while their loads still run
        self._read, self._loader = read, loader
        self._number = count()
        self.prompt, self.written = Counts(), Counts()
        self.wrong_guesses = self.loads = 0

    def held(self, layer: int) -> list[int]:
        """Return the experts that a layer keeps, the one that would be evicted first first."""
        found = self._layers[layer].held
        return sorted(found, key=lambda expert: found[expert].used)

    def begin(self, layer: int, chosen: Mapping[int, int], tokens: int) -> None:
        """Announce what a layer is about to fetch.

        Args:
            layer: the layer.
            chosen: its experts in the order in which they will be fetched, with the last token that chose each.
            tokens: how many tokens the pass has.
        """
        state = self._layers[layer]
        state.first, state.tokens = state.tokens, state.tokens + tokens
        counts = self.written if tokens == 1 else self.prompt
        state.needed, state.current = dict(chosen), None
        for key in [key for key in self._ahead if key[0] == layer and key[1] not in chosen]:
            self._forget(key)
        for expert in chosen:
            guess = self._ahead.get((layer, expert))
            if expert in state.held:
                counts.hits += 1
            elif guess is not None:
                counts.guessed += 1
                self._loader.hurry(guess.load)
            else:
                counts.misses += 1
        self._load_ahead(layer)

    def fetch(self, layer: int, expert: int) -> torch.Tensor:
        """Return the buffer with an expert, which stays as it is until the layer fetches another one or its pass ends."""
        state = self._layers[layer]
        if state.current != expert:
            self._used(state)
            state.current = expert
            if expert not in state.held:
                self._take_in(layer, expert)
            held = state.held[expert]
            held.used = (state.first + state.needed.get(expert, 0), next(self._number))
            self._load_ahead(layer)
            self._loader.finish(held.load)
        return state.held[expert].buffer

    def end(self, layer: int) -> None:
        """Say that a layer's pass is over."""
        self._used(self._layers[layer])
        self._layers[layer].needed.clear()

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """Fetch experts that a layer will probably need, the likeliest first, as far as there are buffers to spare."""
        for expert in experts:
            if expert not in self._layers[layer].held:
                self._send_for(layer, expert, guessed=True)

    def _used(self, state: _Layer) -> None:
        if state.current is not None:
            state.needed.pop(state.current, None)
            state.current = None

    def _load_ahead(self, layer: int) -> None:
        """Send for what the layer needs next and does not hold."""
        state = self._layers[layer]
        for expert in state.needed:
            missing = expert not in state.held and (layer, expert) not in self._ahead
            if missing and not self._send_for(layer, expert, guessed=False):
                return

    def _send_for(self, layer: int, expert: int, guessed: bool) -> bool:
        """Let an expert be loaded into a buffer that no layer keeps; return whether there was one."""
        if (layer, expert) in self._ahead:
            return True
        buffer = self._spare_buffer(needed=not guessed)
        if buffer is None:
            return False
        self._ahead[layer, expert] = self._start(layer, expert, buffer, guessed)
        return True

    def _start(self, layer: int, expert: int, buffer: torch.Tensor, guessed: bool) -> Held:
        held = Held(buffer, ExpertLoad(self._read(layer, expert, buffer)), guessed=guessed)
        self.loads += 1
        self._loader.submit(held.load, urgent=not guessed)
        return held

    def _spare_buffer(self, needed: bool) -> torch.Tensor | None:
        """Return a buffer that nothing is loaded into; for what is needed, a guess may give way, the one made last."""
        for held in [held for held in self._left if held.load.done]:
            self._left.remove(held)
            self._spare.append(held.buffer)
        if not self._spare and needed:
            guesses = [key for key, held in self._ahead.items() if held.guessed and key[1] not in self._needed(key[0])]
            if guesses:
                self._forget(guesses[-1])
        return self._spare.pop() if self._spare else None

    def _needed(self, layer: int) -> Mapping[int, int]:
        return self._layers[layer].needed

    def _forget(self, key: tuple[int, int]) -> None:
        """Give up a guess; its buffer can be used again when nothing is loaded into it any more."""
        held = self._ahead.pop(key)
        self.wrong_guesses += held.guessed
        if self._loader.take_back(held.load):
            self.loads -= 1
            self._spare.append(held.buffer)
        elif held.load.done:
            self._spare.append(held.buffer)
        else:
            self._left.append(held)

    def _take_in(self, layer: int, expert: int) -> None:
        """Give an expert a place in the layer, evicting another one."""
        state = self._layers[layer]
        held = self._ahead.pop((layer, expert), None)
        given_up = state.free.pop() if state.free else self._evict(state)
        if held is None:
            held = self._start(layer, expert, given_up, guessed=False)
        else:
            self._spare.append(given_up)
        state.held[expert] = held

    def _evict(self, state: _Layer) -> torch.Tensor:
        idle = [expert for expert in state.held if expert not in state.needed]
        if idle:
            victim = min(idle, key=lambda expert: state.held[expert].used)
        else:
            order = list(state.needed)
            victim = max((e for e in state.held if e != state.current), key=order.index)
        held = state.held.pop(victim)
        self._loader.finish(held.load)
        return held.buffer
