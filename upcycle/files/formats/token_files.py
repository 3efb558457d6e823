"""Vectors of the calibration tokens in a file: as many as the disk holds, read and written block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from upcycle.errors import CheckpointError

_SPARE = "spare."


class TokenFile:
    """Fp32 vectors of ``width``, one per token, in the order of the tokens."""

    def __init__(self, path: Path, width: int) -> None:
        self.path = path
        self._width = width

    def write(self, blocks: Iterable[torch.Tensor]) -> None:
        """Write all blocks ``[t, width]``; the file gets its name when the last one is written."""
        write_together([self], ((block,) for block in blocks))

    def blocks(self, tokens: int) -> Iterator[torch.Tensor]:
        """Read it all, ``tokens`` at a time: ``[t, width]``.

        Raises:
            CheckpointError: the file ends within a vector.
        """
        with self.path.open("rb", buffering=0) as file:
            while True:
                block = torch.empty(tokens, self._width)
                view, done = block.numpy().data.cast("B"), 0
                while done < len(view) and (read := file.readinto(view[done:])):
                    done += read
                rows, rest = divmod(done, 4 * self._width)
                if rest:
                    raise CheckpointError(f"{self.path} is damaged", hint="convert again with --restart")
                if rows:
                    yield block[:rows]
                if rows < tokens:
                    return

    @property
    def tokens(self) -> int:
        """How many vectors there are."""
        return self.path.stat().st_size // (4 * self._width)

    def holds(self, tokens: int) -> bool:
        """Whether the file is there with that many vectors; a power cut can leave one that is shorter."""
        return self.path.exists() and self.path.stat().st_size == 4 * self._width * tokens

    def release(self) -> None:
        """Give the file up, if it exists; the next one written in its folder takes its place on the disk.

        Writing over a file takes a fraction of the time that a system needs to find room for a new one.
        """
        if self.path.exists():
            self.path.rename(self.path.with_name(_SPARE + self.path.name))


def write_together(files: Sequence[TokenFile], rows: Iterable[Sequence[torch.Tensor]]) -> None:
    """Write several files in one pass: every row has a block for each of them."""
    temporary = [file.path.with_suffix(file.path.suffix + ".tmp") for file in files]
    with ExitStack() as stack:
        handles = []
        for path in temporary:
            spare = next(path.parent.glob(_SPARE + "*"), None)
            if spare:
                spare.rename(path)
            handles.append(stack.enter_context(path.open("r+b" if spare else "wb", buffering=0)))
        for row in rows:
            for handle, block in zip(handles, row, strict=True):
                view, done = block.contiguous().numpy().data.cast("B"), 0
                while done < len(view):
                    done += handle.write(view[done:])
        for handle in handles:
            handle.truncate()
    for path, file in zip(temporary, files, strict=True):
        path.rename(file.path)
