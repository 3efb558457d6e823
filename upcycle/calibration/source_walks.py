"""Runs a whole text through single layers, with states in files, for each source of a mix: each reads its own states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from upcycle.files.formats.token_files import TokenFile, write_together
from upcycle.models.layer_runner import LayerRunner

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint


class SourceWalks:
    """Runs several models of one shape on the same tokens, with one decoder layer of one of them in memory.

    Args:
        members: the models, by the index of their experts.
        dtype: the dtype that their weights are rounded to first.
        windows: the tokens, ids ``[N, W]``.
        folder: where the states are kept until they are released.
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
        """Write every model's embeddings of the tokens, which are the input of layer 0."""
        for source, runner in self._runners.items():
            self._states(source, 0).write(map(runner.embed, self.windows.flatten().split(self.batch)))

    def step(self, index: int, is_moe: bool) -> None:
        """Run layer ``index`` of every model; keep its input, and the FFN's input where the layer is converted (``is_moe``)."""
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
        """Return the inputs of one model's FFN in a layer that :meth:`step` has run."""
        return self._file("x", source, index)

    def holds(self, index: int) -> bool:
        """Return whether the inputs of layer ``index`` are on the disk for every model."""
        return all(self._states(source, index).holds(self.windows.numel()) for source in self._runners)

    def release(self, index: int) -> None:
        """Remove the inputs of layer ``index`` and of its FFN."""
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
    """Write the inputs of a layer's FFN, and the residual that the FFN's output is added to."""
    write_together([inputs, residual], (runner.around(index, block) for block in states.blocks(batch)))


def feed(
    runner: LayerRunner,
    index: int,
    inputs: TokenFile,
    residual: TokenFile,
    states: TokenFile,
    batch: int,
    made: TokenFile | None = None,
) -> None:
    """Write a layer's output (before the norm at its end), and what its FFN ``made``.

    Both are computed from the inputs and the residual that :func:`attend` has written.
    """
    files = [states, made] if made else [states]

    def rows() -> Iterator[list[torch.Tensor]]:
        for before, x in zip(residual.blocks(batch), inputs.blocks(batch), strict=True):
            output = runner.ffn(index, x)
            yield [before + runner.added(index, output), output][: len(files)]

    write_together(files, rows())
