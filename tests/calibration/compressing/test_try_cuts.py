"""Trials of cuts against whole stock models whose experts are really gone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_oracle import layers_of, some_windows, stock, without_experts

from upcycle.architectures.expert_terms import LayerCut
from upcycle.calibration.compressing import moe_walk, try_cuts
from upcycle.calibration.compressing.try_cuts import CutTrial
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.progress import SILENT

Models = Callable[..., Path]
SETS = ([0, 1], [1, 3], [2, 3])


def trial(folder: Path, windows: torch.Tensor) -> CutTrial:
    checkpoint = MoeCheckpoint.open(str(folder))
    return CutTrial(checkpoint, checkpoint.model.config_with(2, 2), "keep", windows, SILENT)


def stream(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """The stream behind the last layer, before the norm."""
    found: list[Any] = []
    handle = layers_of(model)[-1].register_forward_hook(lambda _, __, made: found.append(made))
    with torch.no_grad():
        model(windows, use_cache=False)
    handle.remove()
    return torch.as_tensor(found[0][0] if isinstance(found[0], tuple) else found[0])


NAMES = [
    *("granitemoe", "mixtral", "qwen2_moe", "cohere2_moe", "dots1", "gpt_oss", "phimoe", "granitemoehybrid"),
    *("qwen3_vl_moe", "qwen3_5_moe"),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", NAMES)
def test_the_closest_combination_and_losses_are_those_of_stock_models(
    name: str, pico_moe: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe_walk, "WALK_TOKENS", 64)
    folder, windows = pico_moe(name), some_windows(5, 24)
    whole, own = stock(folder), trial(folder, windows)
    layers = [0, 1] if name != "qwen2_moe" else [1]  # whose first layer is dense
    target, errors, losses = stream(whole, windows), {}, {}
    for sets in itertools.product(SETS, repeat=len(layers)):
        kept = dict(zip(layers, sets, strict=True))
        smaller = without_experts(whole, folder, {0: SETS[0], **kept})
        key = tuple(map(tuple, sets))
        errors[key] = float((stream(smaller, windows) - target).square().sum())
        with torch.no_grad():
            logits = smaller(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
        losses[key] = float(torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten()))
        found = own.loss({layer: LayerCut.keeping(one) for layer, one in kept.items()})
        assert found == pytest.approx(losses[key], rel=1e-5)
    options = {layer: [LayerCut.keeping(one) for one in SETS] for layer in layers}
    best = own.closest(options)
    assert tuple(best[layer].rows for layer in layers) == min(errors, key=lambda key: errors[key])


def test_layers_below_are_cut_already_when_the_next_are_tried(pico_moe: Models) -> None:
    folder, windows = pico_moe("mixtral"), some_windows(4, 24)
    whole, own = stock(folder), trial(folder, windows)
    first = own.closest({0: [LayerCut.keeping(SETS[1])]})
    second = own.closest({1: [LayerCut.keeping(one) for one in SETS]})
    errors = []
    for one in SETS:
        smaller = without_experts(whole, folder, {0: SETS[1], 1: one})
        errors.append(float((stream(smaller, windows) - stream(whole, windows)).square().sum()))
    assert first[0].rows == (1, 3)
    assert second[1].rows == tuple(SETS[errors.index(min(errors))])
    made = stream(without_experts(whole, folder, {0: SETS[1], 1: second[1].rows}), windows)
    assert torch.dist(own._ours.double(), made) < 1e-5 * torch.linalg.norm(made)


def test_some_windows_are_enough(pico_moe: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(try_cuts, "TRIED_TOKENS", 48)
    windows = some_windows(7, 24)
    assert torch.equal(trial(pico_moe("mixtral"), windows)._windows, windows[::4])
