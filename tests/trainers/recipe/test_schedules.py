"""Schedules against their closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from upcycle.errors import UsageError
from upcycle.trainers.recipe.schedules import PRESETS, Schedule, preset


def factors(**keys: Any) -> list[float]:
    schedule = Schedule(**keys)
    return [schedule(step) for step in range(schedule.steps)]


def test_constant_and_warmup() -> None:
    assert factors(kind="constant", steps=6, warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine() -> None:
    actual = factors(kind="cosine", steps=101, floor=0.1)
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(101)]
    assert actual == pytest.approx(expected, rel=1e-14)
    assert actual[0] == 1.0
    assert actual[-1] == pytest.approx(0.1, rel=1e-14)
    warmed = factors(kind="cosine", steps=111, warmup=10, floor=0.1)
    assert warmed[10:] == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
def test_wsd(shape: str) -> None:
    actual = factors(kind="wsd", steps=100, decay=0.2, floor=0.0, shape=shape)
    assert actual[:80] == [1.0] * 80
    for i in range(20):
        done = (i + 1) / 20
        assert actual[80 + i] == pytest.approx(1 - (done if shape == "linear" else math.sqrt(done)), abs=1e-14)


def test_inverse_square_root_goes_on_where_the_dense_run_stopped() -> None:
    """In one run of 300 steps or in one of 200 and one of 100 that knows its position: the same learning rates."""
    whole = factors(kind="inverse_sqrt", steps=300, timescale=50)
    resumed = factors(kind="inverse_sqrt", steps=100, timescale=50, position=200)
    assert resumed == whole[200:]
    assert whole[250] == pytest.approx((50 / 250) ** 0.5, rel=1e-14)
    assert whole[:51] == [1.0] * 51


def test_past_the_end_the_last_factor_stays() -> None:
    for kind in ("constant", "cosine", "wsd", "inverse_sqrt"):
        schedule = Schedule(kind=kind, steps=10)  # type: ignore[arg-type]
        assert schedule(50) == schedule(9)


def test_groups_keep_their_own_peaks() -> None:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1.0, 0.25)]
    optimizer = torch.optim.SGD(groups)
    scheduler = Schedule(kind="cosine", steps=5, floor=0.0).scheduler(optimizer)
    seen = []
    for _ in range(5):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    expected = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    assert [first for first, _ in seen] == pytest.approx(expected, abs=1e-15)
    assert [4 * second for _, second in seen] == pytest.approx(expected, abs=1e-15)


def test_presets() -> None:
    assert preset("nvidia", 2e-4, 100)[0] == 2e-4
    for name, dense_peak, peak, last in (
        ("nvidia", 2e-4, 2e-4, 2e-5),
        ("nvidia_half", 2e-4, 1e-4, 2e-5),
        ("skywork_early", 3e-3, 1.8e-3, 3e-4),
        ("skywork_late", 3e-3, 1.2e-3, 3e-4),
    ):
        actual, schedule = preset(name, dense_peak, 100, warmup=5)
        assert actual == pytest.approx(peak, rel=1e-14)
        assert actual * schedule(99) == pytest.approx(last, rel=1e-14)
    _, schedule = preset("sparse_upcycling", 1e-2, 10, position=40_000)
    assert schedule(0) == 0.5
    assert all(entry.what and entry.paper.startswith("https://") for entry in PRESETS.values())


def test_bad_schedules() -> None:
    with pytest.raises(ValidationError, match="warmup 10 must be less than steps 10"):
        Schedule(steps=10, warmup=10)
    with pytest.raises(ValidationError, match="extra"):
        Schedule(steps=10, warm_up=1)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="unknown learning-rate preset 'nvdia'") as caught:
        preset("nvdia", 1.0, 10)
    assert "did you mean 'nvidia'" in str(caught.value.hint)
