"""Tuning with a clock that is made up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from upcycle.kernels.gpu.compile_gate.candidates import candidates
from upcycle.kernels.gpu.launch_log import Launch
from upcycle.kernels.gpu.tile_table import default_table
from upcycle.kernels.gpu.timing import tune
from upcycle.kernels.layout.expert_weights import ExpertWeights


class OutOfResources(Exception):  # noqa: N818 - Triton's name
    pass


def layer() -> ExpertWeights:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    return ExpertWeights(empty(8 * 128, 256), empty(8 * 64, 256), interleaved=True, widths=(64,) * 8)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    found: list[Launch] = []
    monkeypatch.setattr(tune, "start", found.append)
    return found


def clock(started: list[Launch], seconds: Callable[[Launch], float]) -> tune.Timer:
    def timer(run: Callable[[], None]) -> float:
        started.clear()
        run()
        return sum(map(seconds, started))

    return timer


def test_the_fastest_is_taken(started: list[Launch]) -> None:
    lines: list[str] = []
    timer = clock(started, lambda launch: launch.tile.n * launch.tile.k / launch.tile.stages)
    table = tune.tune(layer(), [64], 2, "sm90", timer, lines.append)
    for family in ("up/interleaved", "gemm", "down_backward", "weight_gradient"):
        expected = min(candidates(2, family)[16], key=lambda tile: tile.n * tile.k / tile.stages)
        assert table.find("sm90", 2, family, 16) == expected
    assert len(lines) == 5
    untouched = {key: tile for key, tile in table.entries.items() if key[0] != "sm90" or key[3] != 16}
    assert untouched.items() <= default_table().entries.items()
    assert table.entries["sm90", 2, "up/plain", 16] == default_table().entries["sm90", 2, "up/plain", 16]


@pytest.mark.long
def test_every_batch_decides_its_bucket(started: list[Launch]) -> None:
    lines: list[str] = []
    tune.tune(layer(), [4, 2048], 2, "sm90", clock(started, lambda launch: 1.0), lines.append)
    assert [line.split(":")[0] for line in lines if line.startswith("gemm")] == [
        "gemm, 16 rows per expert",
        "gemm, 128 rows per expert",
    ]


def test_what_does_not_fit_is_left_out(started: list[Launch]) -> None:
    def seconds(launch: Launch) -> float:
        if launch.family == "gemm" or launch.tile.stages > 3:
            raise OutOfResources
        return 1.0

    lines: list[str] = []
    table = tune.tune(layer(), [1024], 2, "sm90", clock(started, seconds), lines.append)
    assert table.find("sm90", 2, "gemm", 128) == default_table().find("sm90", 2, "gemm", 128)
    assert any("no candidate fits" in line for line in lines)
    assert table.find("sm90", 2, "up/interleaved", 128).stages == 3


def test_other_errors_are_not_hidden(started: list[Launch]) -> None:
    def seconds(launch: Launch) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tune.tune(layer(), [64], 2, "sm90", clock(started, seconds))
