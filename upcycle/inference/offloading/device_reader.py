"""Brings experts from files, or from pinned memory of the host, to where they are computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from threading import Lock, local
from typing import Any

import torch

from upcycle.inference.offloading.expert_files import SLACK, ExpertFiles, aligned_buffer


class DeviceReader:
    """Prepares loads for :class:`~upcycle.inference.offloading.expert_cache.ExpertCache`.

    On the CPU, a file is read straight into the cache's buffer. For another device it is read into memory of the host, pinned
    where the device is a GPU, from which one copy brings the whole expert over: on a stream of the loading thread, behind whatever
    the device still computes with the buffer. The first experts that are read stay in the host's memory.

    Args:
        files: the experts' files.
        nbytes: bytes of the largest expert.
        device: where buffers are.
        host_bytes: how many bytes of experts stay in the host's memory for another device.

    Attributes:
        bytes_read: from files so far.
        bytes_copied: from the host to the device so far.
    """

    def __init__(self, files: ExpertFiles, nbytes: int, device: torch.device, host_bytes: int = 0) -> None:
        self._files, self._nbytes, self._device = files, nbytes, device
        self._host: dict[tuple[int, int], torch.Tensor] = {}
        self._most = host_bytes // (nbytes + SLACK)
        self._lock, self._own = Lock(), local()
        self.bytes_read = self.bytes_copied = 0

    def __call__(self, layer: int, expert: int, buffer: torch.Tensor) -> Callable[[], None]:
        """Return what fills ``buffer`` with an expert."""
        if buffer.device.type == "cpu" and self._device.type == "cpu":
            return lambda: self._read(layer, expert, buffer)
        # What was queued with the buffer's old contents must be done before these are overwritten.
        free = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        return lambda: self._bring(layer, expert, buffer, free)

    def make_buffer(self) -> torch.Tensor:
        """Return memory for one expert where it is computed."""
        if self._device.type == "cpu":
            return aligned_buffer(self._nbytes)
        return torch.empty(self._nbytes + SLACK, dtype=torch.uint8, device=self._device)

    def _read(self, layer: int, expert: int, buffer: torch.Tensor) -> None:
        self._files.read(layer, expert, buffer)
        with self._lock:
            self.bytes_read += self._files.layers[layer].experts[expert].stored_bytes

    def _bring(self, layer: int, expert: int, buffer: torch.Tensor, free: Any) -> None:
        kept = self._host.get((layer, expert))
        if kept is None:
            kept, stays = self._host_buffer()
            self._read(layer, expert, kept)
            if stays:
                self._host[layer, expert] = kept
        size = self._files.layers[layer].experts[expert].nbytes
        stream = self._stream()
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            if free is not None:
                torch.cuda.current_stream(self._device).wait_event(free)
            buffer[:size].copy_(kept[:size], non_blocking=True)
        if stream is not None:
            stream.synchronize()
        with self._lock:
            self.bytes_copied += size

    def _host_buffer(self) -> tuple[torch.Tensor, bool]:
        """Return memory of the host, and whether what is read into it may stay there."""
        with self._lock:
            stays = self._most > 0
            self._most -= stays
        if stays:
            return self._new(), True
        if not hasattr(self._own, "buffer"):
            self._own.buffer = self._new()
        return self._own.buffer, False

    def _new(self) -> torch.Tensor:
        return aligned_buffer(self._nbytes, pinned=self._device.type == "cuda")

    def _stream(self) -> Any:
        if self._device.type != "cuda":
            return None
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)
        return self._own.stream
