"""Starts kernels, or only records what would be started: so the gate compiles exactly what a GPU would run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from upcycle.kernels.gpu.tile_table import Tile, gpu_kind


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments, ready to start."""

    family: str
    """The family of kernels, as the table of tiles names it."""
    kernel: Any
    arguments: dict[str, Any]
    tile: Tile
    grid: tuple[int, ...]


@dataclass(frozen=True)
class LaunchRecord:
    """Launches that were recorded for one kind of GPU."""

    kind: str
    launches: list[Launch]


_recording: ContextVar[LaunchRecord | None] = ContextVar("recording", default=None)


@contextmanager
def recorded(kind: str) -> Iterator[list[Launch]]:
    """A list that launches of this thread are written to while the block lasts, as a GPU of this kind would get them.

    Nothing runs meanwhile, and tensors may be on the meta device.
    """
    record = LaunchRecord(kind, [])
    token = _recording.set(record)
    try:
        yield record.launches
    finally:
        _recording.reset(token)


def kind_for(device: torch.device) -> str:
    """The part of the table of tiles that a device uses, or that is recorded for."""
    record = _recording.get()
    if record is not None:
        return record.kind
    return gpu_kind(torch.cuda.get_device_capability(device)) if device.type == "cuda" else "sm80"


def launch_kernel(family: str, kernel: Any, grid: tuple[int, ...], tile: Tile, **arguments: Any) -> None:
    """Start a kernel, or add it to the record inside :func:`recorded`."""
    one = Launch(family, kernel, arguments, tile, grid)
    record = _recording.get()
    if record is None:
        start(one)
    else:
        record.launches.append(one)


def start(launch: Launch) -> None:
    """Start a launch, unless its grid is empty."""
    if min(launch.grid) > 0:
        # Fusing multiply and add is stated: its default changes between versions of Triton.
        options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages, "enable_fp_fusion": True}
        launch.kernel[launch.grid](**launch.arguments, **options)
