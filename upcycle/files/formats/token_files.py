"""Keeps one vector per calibration token in a file, which may be larger than memory, and reads and writes it block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from upcycle.errors import CheckpointError

_SPARE = "spare."


class TokenFile:
    """A file of fp32 vectors with ``width`` numbers each, one per token, in the tokens' order."""

    def __init__(self, path: Path, width: int) -> None:
        self.path = path
        self._width = width

    def write(self, blocks: Iterable[torch.Tensor]) -> None:
        """Write all blocks ``[t, width]``; the file appears under its name once the last block is written."""
        write_together([self], ((block,) for block in blocks))

    def blocks(self, tokens: int) -> Iterator[torch.Tensor]:
        """Yield the whole file as blocks ``[t, width]`` of at most ``tokens`` vectors, in fp32.

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
        """The number of vectors in the file."""
        return self.path.stat().st_size // (4 * self._width)

    def holds(self, tokens: int) -> bool:
        """Return whether the file exists and has ``tokens`` vectors; after a power cut it can have fewer."""
        return self.path.exists() and self.path.stat().st_size == 4 * self._width * tokens

    def release(self) -> None:
        """Give up the file, if it exists; the next one that is written in its folder reuses its place on the disk.

        Writing over a file takes a fraction of the time that a system needs to find room for a new one.
        """
        if self.path.exists():
            self.path.rename(self.path.with_name(_SPARE + self.path.name))


def write_together(files: Sequence[TokenFile], rows: Iterable[Sequence[torch.Tensor]]) -> None:
    """Write several files in one pass over ``rows``, each of which has a block ``[t, width]`` for every file."""
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
