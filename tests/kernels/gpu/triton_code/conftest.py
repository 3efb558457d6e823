"""Runs the kernels in Triton's interpreter (a process with TRITON_INTERPRET=1: `make kernels`), or on a GPU (`-m gpu`)."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from upcycle.kernels.gpu.tile_table import BUCKETS, GPU_KINDS, KERNEL_FAMILIES, SIZES, Tile, TileTable, default_table

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        where = pytest.param("cpu", id="interpreter") if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("device", [where], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for the interpreter")
    return torch.device(request.param)


def small_table(n: int = 16, k: int = 16) -> TileTable:
    """Tiles so small that small shapes need several of them in every direction."""
    tile = Tile(16, n, k, 2, 4, 2)
    return TileTable(
        {(kind, size, family, BUCKETS[0]): tile for kind in GPU_KINDS for size in SIZES for family in KERNEL_FAMILIES}
    )


@pytest.fixture
def table() -> TileTable:
    """Small tiles in the interpreter, whose time is programs; the committed ones on a GPU."""
    return small_table() if INTERPRETED else default_table()
