"""Speeds are relative to the uncut model with the same kernels, and of a request with the faster ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.evaluation.compressing import cut_times
from upcycle.evaluation.compressing.cut_candidates import CutOptions
from upcycle.evaluation.shape_speed import OWN, STOCK, Times
from upcycle.progress import SILENT


def test_speeds(pico_moe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source = pico_moe("mixtral")
    asked: dict[str, Any] = {}

    def clock(raw: dict[str, Any], shapes: dict[str, Any], layer_bytes: int, layers: int, *_: Any, **__: Any) -> Any:
        asked.update(shapes)
        assert layers == 2
        times = {}
        for name, (config, count) in shapes.items():
            assert count == 2
            share = config["num_experts_per_tok"] * config["intermediate_size"] / 96
            times |= {(name, STOCK): Times(share, share), (name, OWN): Times(share / 2, share**2 / 4)}
        return Times(2.0, 0.5), times, {"device": "cpu"}

    monkeypatch.setattr(cut_times, "time_beside", clock)
    checkpoint = MoeCheckpoint.open(str(source))
    options = CutOptions(checkpoint, str(source), ["demo"], 64, 32, 0)
    made = [
        options.candidate(method, 0.5, refit)
        for method in ("naee", "slim", "lower_top_k")
        for refit in ("none", "down")
    ]
    candidates = [one for one in made if one is not None]
    assert len(candidates) == 6
    timing = cut_times.time_cuts(checkpoint, candidates, 1, SILENT, torch.float32)
    assert len(asked) == 4  # the uncut model, and each shape once
    whole, half = candidates[0].sizes, candidates[-1].sizes
    assert timing.speeds(whole) == {how: {"prefill": 1.0, "decode": 1.0} for how in (STOCK, OWN)}
    assert timing.speeds(half) == {STOCK: {"prefill": 2.0, "decode": 2.0}, OWN: {"prefill": 2.0, "decode": 4.0}}
    assert timing.speed(whole) == 1.0
    # 2 s and 32 tokens of 0.5 s; own kernels take half of the prompt, and a quarter (a sixteenth) of a token.
    assert timing.speed(half) == pytest.approx((1.0 + 4.0) / (0.5 + 1.0))
