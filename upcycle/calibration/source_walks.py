"""A whole text through single layers, in files, and the sources of a mix side by side: every one sees its own states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from upcycle.files.formats.token_files import TokenFile, write_together
from upcycle.models.layer_runner import LayerRunner

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint


class SourceWalks:
    """Several models of one shape on the same tokens, with one decoder layer of one of them in memory.

    Args:
        members: the models, by the index that their experts have.
        dtype: their weights are rounded to this dtype first.
        windows: the tokens, ids ``[N, W]``.
        folder: where token files are kept while it lasts.
        batch: tokens at a time, a multiple of ``W``.
    """

    def __init__(
        self, members: Mapping[int, DenseCheckpoint], dtype: str, windows: torch.Tensor, folder: Path, batch: int
    ) -> None:
        self.windows, self.batch = windows, batch
        self._folder = folder
        first = next(iter(members.values()))
        runner = LayerRunner(first, dtype, windows.shape[1])
        self._runners = {i: runner.reading(member) for i, member in members.items()}
        self._width = first.config.hidden_size

    def start(self) -> None:
        """Write every model's embeddings of the tokens, the states that layer 0 begins with."""
        for source, runner in self._runners.items():
            self._states(source, 0).write(map(runner.embed, self.windows.flatten().split(self.batch)))

    def step(self, index: int, is_moe: bool) -> None:
        """Run layer ``index`` of every model; keeps what it began with, and of a layer to be converted the FFN's inputs."""
        for source, runner in self._runners.items():
            before, after = self._states(source, index), self._states(source, index + 1)
            with runner.loaded(index), torch.no_grad():
                if is_moe:
                    residual = self._file("residual", source, index)
                    attend(runner, index, before, self.inputs(source, index), residual, self.batch)
                    feed(runner, index, self.inputs(source, index), residual, after, self.batch)
                    residual.release()
                else:
                    after.write(runner.whole(index, states) for states in before.blocks(self.batch))

    def inputs(self, source: int, index: int) -> TokenFile:
        """What one model's FFN of a layer reads, once :meth:`step` has run it."""
        return self._file("x", source, index)

    def holds(self, index: int) -> bool:
        """Whether the states are there that layer ``index`` begins with."""
        return all(self._states(source, index).holds(self.windows.numel()) for source in self._runners)

    def release(self, index: int) -> None:
        """Give up what layer ``index`` began with and what was read in it."""
        for source in self._runners:
            self._states(source, index).release()
            self.inputs(source, index).release()

    def _states(self, source: int, index: int) -> TokenFile:
        return self._file("states", source, index)

    def _file(self, name: str, source: int, index: int) -> TokenFile:
        return TokenFile(self._folder / f"{name}-{source}.{index}", self._width)


def attend(
    runner: LayerRunner, index: int, states: TokenFile, inputs: TokenFile, residual: TokenFile, batch: int
) -> None:
    """Write what the FFN of a layer reads and what its output is added to."""
    write_together([inputs, residual], (runner.around(index, block) for block in states.blocks(batch)))


def feed(
    runner: LayerRunner, index: int, inputs: TokenFile, residual: TokenFile, states: TokenFile, batch: int
) -> None:
    """Write a layer's output, from what :func:`attend` has written."""
    ffn = runner.block(index)
    pairs = zip(residual.blocks(batch), inputs.blocks(batch), strict=True)
    states.write(before + ffn(x) for before, x in pairs)
