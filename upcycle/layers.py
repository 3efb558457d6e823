"""Runs single decoder layers of a dense model with stock code, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from upcycle.runtime import dense_reader, fill, skeleton

if TYPE_CHECKING:
    from upcycle.checkpoint import DenseCheckpoint

Ffn = Callable[[torch.Tensor], torch.Tensor]


class LayerRunner:
    """A dense model of which one decoder layer at a time has weights.

    Args:
        checkpoint: the dense model.
        dtype: its weights are rounded to this dtype first, and computed with in fp32.
        window: tokens per sequence.
    """

    def __init__(self, checkpoint: DenseCheckpoint, dtype: str, window: int) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self.window = window
        self._read = dense_reader(checkpoint, dtype)
        family, config = checkpoint.family, checkpoint.config
        outside = {**family.first_specs(config), **family.last_specs(config)}
        nothing = {name: torch.empty(shape, device="meta") for name, shape in outside.items()}
        self.model: Any = skeleton(checkpoint.raw_config, nothing).eval()
        self.layers = self.model.model.layers
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Fp32 ``[T, d]`` for token ids ``[T]``; the table is read block by block and never whole in memory."""
        (name,) = self._checkpoint.family.first_specs(self._checkpoint.config)
        found = torch.empty(len(ids), self._checkpoint.config.hidden_size)
        first = 0
        for block in self._checkpoint.chunks(name, self._dtype):
            inside = (ids >= first) & (ids < first + len(block))
            found[inside] = block[ids[inside] - first].float()
            first += len(block)
        return found

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """Layer ``index`` has its weights inside this context."""
        fill(self.layers[index], index, self._read)
        try:
            yield
        finally:
            self.layers[index].to("meta")

    def whole(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """The layer's output ``[t, d]`` for its input ``[t, d]``; ``t`` is a multiple of the window."""
        output, _ = self._run(index, states, None)
        return output

    def around(self, index: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer's FFN reads and what its output is added to, each ``[t, d]``."""
        residual, x = self._run(index, states, torch.zeros_like)
        return x, residual

    def _run(self, index: int, states: torch.Tensor, ffn: Ffn | None) -> tuple[torch.Tensor, torch.Tensor]:
        windows = states.view(-1, self.window, states.shape[-1])
        layer, seen = self.layers[index], [states]

        def capture(x: torch.Tensor) -> torch.Tensor:
            seen[0] = x
            assert ffn is not None
            return ffn(x)

        stock = layer.mlp.forward
        if ffn is not None:
            layer.mlp.forward = capture
        try:
            with torch.no_grad():
                output = layer.forward(windows, **self.arguments(index, len(windows)))
        finally:
            layer.mlp.forward = stock
        return _flat(output[0] if isinstance(output, tuple) else output), _flat(seen[0])

    def arguments(self, index: int, windows: int) -> dict[str, Any]:
        """What the stock model hands to layer ``index`` beside the states: masks, positions and rotary embeddings.

        Asked of the stock model itself, with layers that do nothing, so that every family's masks are its own.
        """
        if windows not in self._arguments:
            seen: list[dict[str, Any]] = []

            def nothing(states: torch.Tensor, **arguments: Any) -> torch.Tensor:
                seen.append(arguments)
                return states

            normal = self.model.model.norm.forward
            for layer in self.layers:
                layer.forward = nothing
            self.model.model.norm.forward = lambda states: states
            try:
                shape = (windows, self.window, self._checkpoint.config.hidden_size)
                with torch.no_grad():
                    self.model.model(inputs_embeds=torch.zeros(shape), use_cache=False)
            finally:
                for layer in self.layers:
                    del layer.forward
                self.model.model.norm.forward = normal
            self._arguments = {windows: seen}
        return self._arguments[windows][index]


def _flat(states: torch.Tensor) -> torch.Tensor:
    return states.reshape(-1, states.shape[-1])
