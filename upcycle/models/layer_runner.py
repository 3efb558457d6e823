"""Runs single layers of a dense model, decoder or encoder, with stock code, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import torch

from upcycle.models.body_pass import layer_arguments
from upcycle.models.stock_layers import compute_layer_buffers
from upcycle.models.stock_model import dense_reader, fill, skeleton

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint

Ffn = Callable[[torch.Tensor], torch.Tensor]
Pixels = Callable[[torch.Tensor], torch.Tensor]


class LayerRunner:
    """Runs the decoder layers of a dense model; only the layer that runs has its weights in memory.

    States are the residual stream divided by the configuration's ``residual_multiplier``, so that an FFN's output is added to
    them unscaled in every family. Where layers norm behind that sum (BERT), the sum has methods of its own.

    Args:
        checkpoint: the dense model.
        dtype: round the weights to this dtype (``keep``: leave them as stored); computation is in fp32 either way.
        window: tokens per sequence; of a model that reads images, the states that it makes of one.
        pixels: gives the images ``[n, C, H, W]`` of some numbers ``[n]``; None: the model reads text.
    """

    def __init__(self, checkpoint: DenseCheckpoint, dtype: str, window: int, pixels: Pixels | None = None) -> None:
        self._checkpoint, self._pixels = checkpoint, pixels
        self._dtype = dtype
        self.window = window
        self._read = dense_reader(checkpoint, dtype)
        family, config = checkpoint.family, checkpoint.config
        self._unit = config.residual_multiplier
        outside = family.stored_specs(config, None)
        head = {family.module_paths.head_weight, f"{family.module_paths.head}.bias"}
        read = set() if family.embeds_tokens_alone else {n for n in outside if family.model_name(n) not in head}
        weights = {
            family.model_name(name): checkpoint.read(name, dtype).float()
            if name in read
            else torch.empty(shape, device="meta")
            for name, shape in outside.items()
        }
        self.model: Any = skeleton(checkpoint.raw_config, weights).eval()
        self.layers = family.module_paths.layers_in(self.model)
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    def reading(self, checkpoint: DenseCheckpoint) -> LayerRunner:
        """Return a runner for another model of this shape, which shares the modules: only one of the two may load a layer."""
        other = copy(self)
        other._checkpoint, other._read = checkpoint, dense_reader(checkpoint, self._dtype)
        return other

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the fp32 states ``[T, d]`` of token ids ``[T]``, of whole windows; of images, of their numbers, one per state.

        Where the first layer reads token embeddings alone, the table is read block by block, never as a whole. Elsewhere the stock
        model adds positions, norms and so on itself, to a table in memory.
        """
        if not self._checkpoint.family.embeds_tokens_alone:
            rows = ids.view(-1, self.window)
            read = {"pixel_values": self._pixels(rows[:, 0])} if self._pixels else {"input_ids": rows}
            states, _ = self._pass(**read)
            return _flat(states) if self._unit == 1 else _flat(states) / self._unit
        config = self._checkpoint.config
        (name,) = self._checkpoint.family.first_specs(config)
        found = torch.empty(len(ids), config.hidden_size)
        first = 0
        for block in self._checkpoint.chunks(name, self._dtype):
            inside = (ids >= first) & (ids < first + len(block))
            found[inside] = block[ids[inside] - first].float()
            first += len(block)
        factor = config.embedding_multiplier / self._unit
        return found if factor == 1 else found * factor

    def block(self, index: int) -> torch.nn.Module:
        """Return the dense FFN of a layer, or where the layer calls the parts of its FFN itself, the first of them."""
        block: torch.nn.Module = self.layers[index].get_submodule(self._checkpoint.family.module_paths.block)
        return block

    def ffn(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return what a layer's FFN makes of its input ``[t, d]``."""
        if self._checkpoint.family.module_paths.ends is None:
            made: torch.Tensor = self.block(index)(x)
            return made
        for path in self._checkpoint.family.replaced_modules(index):
            x = self.model.base_model.get_submodule(path)(x)
        return x

    @property
    def norms_output(self) -> bool:
        """Whether layers norm what their FFN makes before they add it to the stream."""
        return self._checkpoint.family.module_paths.output_norm is not None

    def added(self, index: int, made: torch.Tensor) -> torch.Tensor:
        """Return what a layer adds to the states for what its FFN, or the experts in its place, made: ``[t, d]`` both."""
        norm = self._checkpoint.family.module_paths.output_norm
        if norm is None:
            return made
        normed: torch.Tensor = self.layers[index].get_submodule(norm)(made)
        return normed

    def down(self, index: int) -> torch.nn.Module:
        """Return the FFN's down projection, whose input is the activations."""
        name = self._checkpoint.family.ffn_origins(self._checkpoint.config, index)["down"].name
        module: torch.nn.Module = self.model.get_submodule(
            self._checkpoint.family.model_name(name).removesuffix(".weight")
        )
        return module

    def forward(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Return the layer's output ``[N, window, d]`` for its input of the same shape, by the stock code."""
        stream = states if self._unit == 1 else states * self._unit
        outcome = self.layers[index].forward(stream, **self.arguments(index, len(states)))
        output: torch.Tensor = outcome[0] if isinstance(outcome, tuple) else outcome
        return output if self._unit == 1 else output / self._unit

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """Load the weights of layer ``index`` inside the ``with`` block."""
        fill(self.layers[index], self._checkpoint.family.module_paths.layer(index), self._read(index))
        compute_layer_buffers(self.model, index)
        try:
            yield
        finally:
            self.layers[index].to("meta")

    def whole(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Return the layer's output ``[t, d]`` for its input ``[t, d]``; ``t`` is a multiple of the window."""
        output, _ = self._run(index, states, None)
        return output

    def outcome(self, index: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layer's output and what its FFN made, each ``[t, d]``, for its input ``[t, d]``."""
        ends, made = self._checkpoint.family.module_paths.ends, list[torch.Tensor]()
        last = self.block(index) if ends is None else self.layers[index].get_submodule(ends)
        hook = last.register_forward_hook(lambda _module, _inputs, output: made.append(output.clone()))
        try:
            output = self.whole(index, states)
        finally:
            hook.remove()
        return output, _flat(made[0])

    @property
    def closes(self) -> bool:
        """Whether layers norm behind the sum of stream and FFN output, so that the sum is not yet the next layer's input."""
        return self._checkpoint.family.module_paths.closing is not None

    def closed(self, index: int, sums: torch.Tensor) -> torch.Tensor:
        """Return a layer's output for what its FFN's output and the stream before it add up to, each ``[t, d]``."""
        closing = self._checkpoint.family.module_paths.closing
        if closing is None:
            return sums
        made: torch.Tensor = self.layers[index].get_submodule(closing)(sums)
        return made

    def summed(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Return the sum of a layer's FFN output and the stream before it, for the layer's input; see :meth:`closed`."""
        with self._unclosed(index):
            return self.whole(index, states)

    @contextmanager
    def _unclosed(self, index: int) -> Iterator[None]:
        """Let the norm at the end of a layer, if it has one, do nothing."""
        closing = self._checkpoint.family.module_paths.closing
        if closing is None:
            yield
            return
        norm = self.layers[index].get_submodule(closing)
        norm.forward = lambda states: states
        try:
            yield
        finally:
            del norm.forward

    def around(self, index: int, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the input of the layer's FFN and the residual that :meth:`added` is added to, each ``[t, d]``."""
        with self._unclosed(index):
            residual, x = self._run(index, states, torch.zeros_like)
        return x, residual

    def _run(self, index: int, states: torch.Tensor, ffn: Ffn | None) -> tuple[torch.Tensor, torch.Tensor]:
        windows = states.view(-1, self.window, states.shape[-1])
        seen, block, ends = [states], self.block(index), self._checkpoint.family.module_paths.ends
        last = block if ends is None else self.layers[index].get_submodule(ends)

        def capture(x: torch.Tensor) -> torch.Tensor:
            seen[0] = x
            return x

        def replaced(x: torch.Tensor) -> torch.Tensor:
            assert ffn is not None
            return ffn(capture(x) if last is block else seen[0])

        if ffn is not None:
            block.forward = capture
            last.forward = replaced
        try:
            with torch.no_grad():
                output = self.forward(index, windows)
        finally:
            for module in (block, last):
                module.__dict__.pop("forward", None)
        return _flat(output), _flat(seen[0])

    def arguments(self, index: int, windows: int) -> dict[str, Any]:
        """Return the keyword arguments that the stock model passes to layer ``index``: masks, positions and so on.

        The stock model computes them itself, in a pass through layers that do nothing, so that no family's masks are copied here.
        """
        if windows not in self._arguments:
            _, seen = self._pass(**self._nothing(windows))
            self._arguments.clear()
            self._arguments[windows] = seen
        return self._arguments[windows][index]

    def _nothing(self, windows: int) -> dict[str, torch.Tensor]:
        """Return an input of as many windows, whose content does not matter."""
        if self._pixels:
            return {"pixel_values": self._pixels(torch.zeros(1, dtype=torch.long)).expand(windows, -1, -1, -1)}
        if self._checkpoint.family.encoder:  # some embed in another width than d
            return {"input_ids": torch.zeros(windows, self.window, dtype=torch.long)}
        return {"inputs_embeds": torch.zeros(windows, self.window, self._checkpoint.config.hidden_size)}

    def _pass(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Run the stock model with layers that do nothing; return what the first reads, and every layer's other arguments."""
        family = self._checkpoint.family
        settings = {} if family.encoder else {"use_cache": False}
        return layer_arguments(
            self.model, family.module_paths, self.layers, {**inputs, **settings}, wraps=family.returns_tuple
        )


def logits_of(model: Any, checkpoint: DenseCheckpoint, states: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[N, T, V]`` for the states ``[N, T, d]`` of a :class:`LayerRunner` behind the last layer.

    ``model`` is the dense model's :func:`~upcycle.models.stock_model.skeleton`.
    """
    config, paths = checkpoint.config, checkpoint.family.module_paths
    norm, head = model.get_submodule(paths.final_norm), model.get_submodule(paths.head)
    stream = states if config.residual_multiplier == 1 else states * config.residual_multiplier
    logits: torch.Tensor = head(norm(stream))
    if config.logits_multiplier != 1:
        logits = logits * config.logits_multiplier
    return logits if config.logits_cap is None else torch.tanh(logits / config.logits_cap) * config.logits_cap


def _flat(states: torch.Tensor) -> torch.Tensor:
    return states.reshape(-1, states.shape[-1])
