"""Reads single experts out of a checkpoint's files, and notices when a file changes."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch

from upcycle.errors import CheckpointError
from upcycle.inference.offloading.expert_layout import StoredExpert, StoredExperts

_HINT = "download or copy the file again, and leave it alone while the model writes"


class ExpertFiles:
    """Reads experts into memory that the caller owns; several threads may read at once. A context manager.

    Nothing is mapped: what is read is in the caller's memory, and otherwise in the system's page cache alone, which the system
    takes back whenever it needs memory.

    Args:
        layers: the experts of every layer.
        keep_pages: leave what was read in the page cache. Otherwise the system is asked to drop it at once, so that no more of
            the files is in memory than the caller holds.
    """

    def __init__(self, layers: list[StoredExperts], keep_pages: bool = True) -> None:
        self.layers, self._keep_pages = layers, keep_pages
        files = {extent.file.path: extent.file for layer in layers for one in layer.experts for extent in one.extents}
        self._open: dict[Path, int] = {}
        self._seen: dict[Path, tuple[int, int]] = {}
        try:
            for path, file in files.items():
                handle = self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                self._seen[path] = _state(handle)
                if self._seen[path][0] != file.size:
                    raise _changed(path, f"it had {file.size:,} bytes, and has {self._seen[path][0]:,}")
        except BaseException:
            self.close()
            raise

    def read(self, layer: int, expert: int, buffer: torch.Tensor) -> None:
        """Fill the first bytes of ``buffer`` (uint8, on the CPU) with an expert, as its layout says.

        Raises:
            CheckpointError: a file became shorter, or was changed, since it was opened.
        """
        found: StoredExpert = self.layers[layer].experts[expert]
        into = memoryview(buffer.numpy())
        for extent in found.extents:
            handle, path = self._open[extent.file.path], extent.file.path
            done = 0
            while done < extent.count:
                part = into[extent.at + done : extent.at + extent.count]
                got = os.preadv(handle, [part], extent.first + done)
                if not got:
                    raise _changed(path, f"it ends at byte {extent.first + done:,}")
                done += got
            if _state(handle) != self._seen[path]:
                raise _changed(path, f"it had {self._seen[path][0]:,} bytes, and was written to since")
            if not self._keep_pages:
                os.posix_fadvise(handle, extent.first, extent.count, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the files."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def __enter__(self) -> ExpertFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _state(handle: int) -> tuple[int, int]:
    """Return the size of a file and when it was last written to."""
    about = os.fstat(handle)
    return about.st_size, about.st_mtime_ns


def _changed(path: Path, how: str) -> CheckpointError:
    return CheckpointError(f"{path} changed while its experts were read: {how}", hint=_HINT)
