"""Tries cuts of several layers of a Mixture-of-Experts together, on text.

N windows of W tokens, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from upcycle.architectures.expert_terms import LayerCut
from upcycle.calibration.compressing.moe_walk import MoeWalk
from upcycle.calibration.compressing.refit_cut import CutLayers, stored_dtype
from upcycle.models.stock_layers import layers_of
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint

TRIED_TOKENS = 4096
_TRIED_NUMBERS = 32_000_000  # of all streams that are in memory while combinations are tried
_STREAMS = 27  # three candidates of three layers


class CutTrial:
    """Compares cuts of a MoE by what they do on text. Implements :class:`upcycle.methods.compressing.base.Trial`.

    Args:
        checkpoint: the MoE before it is cut.
        config: the ``config.json`` of the result.
        dtype: the dtype that the result is written in, as a recipe means it.
        windows: the text, token ids ``[N, W]``; some windows, spread over it, are used.
        progress: where to report.
    """

    def __init__(
        self,
        checkpoint: MoeCheckpoint,
        config: Mapping[str, Any],
        dtype: str,
        windows: torch.Tensor,
        progress: Progress,
    ) -> None:
        width = windows.shape[1]
        most = max(1, min(TRIED_TOKENS, _TRIED_NUMBERS // (_STREAMS * checkpoint.model.hidden_size)) // width)
        self._windows = windows[:: -(-len(windows) // most)]
        self._uncut = MoeWalk(layers_of(checkpoint, dtype), width)
        self._cuts: dict[int, LayerCut] = {}
        stored = partial(stored_dtype, checkpoint, dtype)
        self._cut = MoeWalk(CutLayers(self._uncut, config, self._cuts, stored), width)
        self._progress = progress
        self._next = 0  # the layer before which both streams are
        batches = [*self._uncut.batches(len(self._windows))]
        self._theirs = torch.cat([self._uncut.embed(self._windows[batch]) for batch in batches])
        self._ours = self._theirs

    def closest(self, options: Mapping[int, Sequence[LayerCut]]) -> dict[int, LayerCut]:
        """Return, for the next layers, the combination of cuts behind whose last layer the stream is closest to the uncut model's.

        Args:
            options: the cuts of every layer, which come after those of the last call.
        """
        tried: list[tuple[dict[int, LayerCut], torch.Tensor]] = [({}, self._ours)]
        last = max(options)
        with self._progress.phase(f"trying layers {self._next} to {last}", last + 1 - self._next):
            for index in range(self._next, last + 1):
                tried = [
                    ({**chosen, index: cut} if cut else chosen, self._run(index, cut, states))
                    for cut in options.get(index, [None])
                    for chosen, states in tried
                ]
                with self._uncut.loaded(index):
                    self._theirs = self._pass(self._uncut, index, self._theirs)
                self._progress.advance()
        self._next = last + 1
        errors = [(states - self._theirs).double().square().sum().item() for _, states in tried]
        best, self._ours = tried[errors.index(min(errors))]
        return best

    def loss(self, cuts: Mapping[int, LayerCut]) -> float:
        """Return the mean loss per token, in nats, of the whole model with cuts of all its layers with experts."""
        batches = [*self._uncut.batches(len(self._windows))]
        states = torch.cat([self._uncut.embed(self._windows[batch]) for batch in batches])
        for index in range(len(self._cut.layers)):
            states = self._run(index, cuts.get(index), states)
        total = 0.0
        for batch in batches:
            ids = self._windows[batch]
            logits = self._head(states[batch])[:, :-1].flatten(0, 1)
            total += cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum").item()
        return total / self._windows[:, 1:].numel()

    def _run(self, index: int, cut: LayerCut | None, states: torch.Tensor) -> torch.Tensor:
        """Return what a layer puts out with a cut (None: it has no experts)."""
        self._cuts.pop(index, None)
        if cut is not None:
            self._cuts[index] = cut
        with self._uncut.loaded(index), self._cut.loaded(index):
            return self._pass(self._cut, index, states)

    @staticmethod
    def _pass(walk: MoeWalk, index: int, states: torch.Tensor) -> torch.Tensor:
        return torch.cat([walk.run(index, states[batch]) for batch in walk.batches(len(states))])

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits of states behind the last layer, by the stock class's own code: its layers pass these states on."""
        layers = self._uncut.layers
        for layer in layers:
            layer.forward = lambda *_, **__: states
        try:
            with torch.no_grad():
                found: torch.Tensor = self._uncut.model(inputs_embeds=torch.zeros_like(states), use_cache=False).logits
                return found
        finally:
            for layer in layers:
                del layer.forward
