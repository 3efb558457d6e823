"""Reads single experts out of a checkpoint's files, and notices when a file changes."""

from __future__ import annotations

import mmap
import os
from ctypes import memmove
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from upcycle.errors import CheckpointError
from upcycle.inference.offloading.expert_layout import Extent, StoredExpert, StoredExperts

_BLOCK = 4096  # bytes: of what reads past the page cache must be multiples
SLACK = 3 * _BLOCK  # bytes that a buffer has more than an expert, for such reads
_HINT = "download or copy the file again, and leave it alone while the model writes"


class ExpertFiles:
    """Reads experts into memory that the caller owns; several threads may read at once. A context manager.

    Nothing is mapped. Past the page cache, exactly the bytes of an expert are read; a mapping, or plain reads, make the system read
    ahead, which for experts here and there in a large file is as much again.

    Args:
        layers: the experts of every layer.
        keep_pages: read through the system's page cache, which keeps what was read for as long as there is memory to spare. Otherwise
            reads go past it where the file system lets them (Linux, not tmpfs), and elsewhere the system is asked to drop the pages.
    """

    def __init__(self, layers: list[StoredExperts], keep_pages: bool = True) -> None:
        self.layers, self._keep_pages = layers, keep_pages
        files = {extent.file.path: extent.file for layer in layers for one in layer.experts for extent in one.extents}
        self._open: dict[Path, int] = {}
        self._direct: dict[Path, int] = {}
        self._seen: dict[Path, tuple[int, int]] = {}
        try:
            for path, file in files.items():
                handle = self._open[path] = os.open(path, os.O_RDONLY)
                self._seen[path] = _state(handle)
                if self._seen[path][0] != file.size:
                    raise _changed(path, f"it had {file.size:,} bytes, and has {self._seen[path][0]:,}")
                _advise(handle, 0, 0, "POSIX_FADV_RANDOM")  # no reading ahead: experts lie here and there
                if not keep_pages and (past := _open_past_cache(path)) is not None:
                    self._direct[path] = past
        except BaseException:
            self.close()
            raise

    def read(self, layer: int, expert: int, buffer: torch.Tensor) -> None:
        """Fill the first bytes of ``buffer`` (uint8, on the CPU, of :func:`aligned_buffer`) with an expert, as its layout says.

        Raises:
            CheckpointError: a file became shorter, or was changed, since it was opened.
        """
        found: StoredExpert = self.layers[layer].experts[expert]
        roomy = buffer.data_ptr() % _BLOCK == 0 and len(buffer) >= found.nbytes + SLACK
        for extent in found.extents:  # in the order of their places: a read may spill over into those behind it
            path = extent.file.path
            if roomy and path in self._direct:
                self._read_past_cache(path, buffer, extent)
            else:
                part = _view(buffer)[extent.at : extent.at + extent.count]
                self._read_plainly(path, part, extent.first)
            if _state(self._open[path]) != self._seen[path]:
                raise _changed(path, f"it had {self._seen[path][0]:,} bytes, and was written to since")

    def _read_plainly(self, path: Path, part: memoryview, first: int) -> None:
        done = 0
        while done < len(part):
            got = os.preadv(self._open[path], [part[done:]], first + done)
            if not got:
                raise _changed(path, f"it ends at byte {first + done:,}")
            done += got
        if not self._keep_pages:
            _advise(self._open[path], first, len(part), "POSIX_FADV_DONTNEED")

    def _read_past_cache(self, path: Path, buffer: torch.Tensor, extent: Extent) -> None:
        """Read whole blocks to a place that begins at one, as the system demands, and move what was asked for to where it belongs."""
        start = extent.first // _BLOCK * _BLOCK
        before, place = extent.first - start, -(-extent.at // _BLOCK) * _BLOCK
        length = -(-(before + extent.count) // _BLOCK) * _BLOCK
        into, got = _view(buffer)[place : place + length], 0
        while got < before + extent.count:
            more = os.preadv(self._direct[path], [into[got:]], start + got)
            got += more
            if not more or (got % _BLOCK and got < before + extent.count):
                raise _changed(path, f"it ends at byte {start + got:,}")
        first = buffer.data_ptr()
        memmove(first + extent.at, first + place + before, extent.count)

    def close(self) -> None:
        """Close the files."""
        for handles in (self._open, self._direct):
            for handle in handles.values():
                os.close(handle)
            handles.clear()

    def __enter__(self) -> ExpertFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _view(buffer: torch.Tensor) -> memoryview:
    bytes_of: Any = buffer.numpy()
    return memoryview(bytes_of)


def aligned_buffer(nbytes: int, pinned: bool = False) -> torch.Tensor:
    """Return memory for an expert of so many bytes on the CPU, into which reads past the page cache are possible."""
    whole = torch.empty(nbytes + SLACK + _BLOCK, dtype=torch.uint8, pin_memory=pinned)
    skipped = -whole.data_ptr() % _BLOCK
    return whole[skipped : skipped + nbytes + SLACK]


def _open_past_cache(path: Path) -> int | None:
    """Open a file so that reads go past the page cache; None where that is not possible."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY | flag)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, _BLOCK) as block:
            os.preadv(handle, [block], 0)
    except OSError:  # some file systems find out when they read
        os.close(handle)
        return None
    return handle


def _advise(handle: int, first: int, count: int, advice: str) -> None:
    """Give the system advice about a part of a file, where it takes any."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, first, count, getattr(os, advice))


def _state(handle: int) -> tuple[int, int]:
    """Return the size of a file and when it was last written to."""
    about = os.fstat(handle)
    return about.st_size, about.st_mtime_ns


def _changed(path: Path, how: str) -> CheckpointError:
    return CheckpointError(f"{path} changed while its experts were read: {how}", hint=_HINT)
