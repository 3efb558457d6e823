"""How many experts every layer keeps where all layers share one budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_sources import random_observations
from transformers import AutoModelForCausalLM

import upcycle
import upcycle.models
from upcycle.errors import UsageError
from upcycle.methods.compressing.dropping.scored import shared_out

Models = Callable[..., Path]
TEXT: dict[str, Any] = {"text": "demo", "tokens": 512, "window": 32}
UNEVEN: dict[str, Any] = {"parameters": {"layers": "uneven"}, "calibration": TEXT, "verification": {"tokens": 64}}


def restated(scores: dict[int, list[float]], total: int, least: int) -> dict[int, int]:
    """The largest shares of all layers, one at a time; a layer's own best do not count as long as it must keep them."""
    left = {layer: sorted((s / sum(own) for s in own), reverse=True) for layer, own in scores.items()}
    counts = dict.fromkeys(scores, least)
    for _ in range(total - least * len(scores)):
        layer = max(
            (name for name in left if counts[name] < len(left[name])), key=lambda name: left[name][counts[name]]
        )
        counts[layer] += 1
    return counts


@pytest.mark.parametrize("total", [4, 7, 11, 18])
def test_the_largest_shares_of_all_layers_stay(total: int) -> None:
    scores = {layer: random_observations(6, seed=layer).saliency * 10.0**layer for layer in (0, 2, 5)}
    total = max(total, 6)
    found = shared_out(scores, total, 2)
    assert found == restated({layer: own.tolist() for layer, own in scores.items()}, total, 2)
    assert sum(found.values()) == total
    mixed = {
        layer: own[torch.randperm(6, generator=torch.Generator().manual_seed(layer))] for layer, own in scores.items()
    }
    assert shared_out(mixed, total, 2) == found


def test_a_layer_whose_scores_are_all_zero_keeps_the_least() -> None:
    assert shared_out({0: torch.zeros(4), 1: torch.ones(4)}, 6, 2) == {0: 2, 1: 4}


def test_a_stock_class_holds_no_uneven_layers(pico_moe: Models) -> None:
    source = str(pico_moe("mixtral"))
    with pytest.raises(
        UsageError, match="leaves layers of different sizes, and a 'mixtral' model has equally many"
    ) as caught:
        upcycle.plan(source, method="reap", keep=0.75, **UNEVEN)
    assert caught.value.hint == "--target upcycle_moe, or --param layers=even"
    assert upcycle.plan(source, method="reap", keep=1.0, **UNEVEN).promise == "exact"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("method", ["frequency", "reap"])
def test_uneven_layers_are_written_refitted_and_loaded(method: str, pico_moe: Models, tmp_path: Path) -> None:
    keys = {**UNEVEN, "method": method, "keep": 0.75, "target": "upcycle_moe"}
    result = upcycle.convert(str(pico_moe("qwen3_moe")), tmp_path / "out", **keys)
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    cuts = json.loads((tmp_path / "out" / "compression.json").read_text())
    sizes = [len(cut["experts"]) for cut in cuts["experts"].values()]
    assert sum(sizes) == 6
    assert all(one["missing_after"] <= one["missing_before"] for one in cuts["refit"].values())
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert [block.count for name, block in model.named_modules() if name.endswith("experts")] == sizes
    assert upcycle.verify(tmp_path / "out", tokens=64) == result.verification
