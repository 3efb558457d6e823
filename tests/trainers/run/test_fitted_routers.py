"""Routers that a conversion fitted are spared where a recipe says nothing of them, and not where it does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import recipe_for, run

from upcycle.trainers.checkpoints.read import latest

Model = Callable[[str], Path]
ROUTER = "gate.weight"
KEPT = 0.1  # of their size is what a few steps may change


@pytest.fixture
def fitted(pico_moe: Model, tmp_path: Path) -> Path:
    """A MoE whose routers are as small as a calibrated conversion makes them, with its record."""
    folder = shutil.copytree(pico_moe("mixtral"), tmp_path / "fitted")
    tensors = load_file(folder / "model.safetensors")
    small = {name: 1e-5 * each / each.std() if name.endswith(ROUTER) else each for name, each in tensors.items()}
    save_file(small, folder / "model.safetensors", {"format": "pt"})
    (folder / "upcycle.json").write_text(json.dumps({"format": 1, "router": {"name": "ridge"}}), encoding="utf-8")
    return folder


def changed(before: Path, recipe: Any) -> float:
    """How far the routers are from where they were, relative."""
    saved = latest(Path(recipe.output))
    assert saved
    was, now = routers(before.glob("*.safetensors")), routers(saved.folder.glob("model-*.safetensors"))
    assert len(was) == len(now) > 0
    return float((now - was).norm() / was.norm())


def routers(files: Iterable[Path]) -> torch.Tensor:
    """All their weights, in the order of layers."""
    rows = {name: each for file in files for name, each in load_file(file).items() if name.endswith(ROUTER)}
    return torch.cat([rows[name].double().flatten() for name in sorted(rows)])


def of(model: Path, output: Path, **stage: Any) -> Any:
    return recipe_for(model, output, stage={"learning_rate": 1e-3, "weight_decay": 0.0, **stage})


def test_they_are_spared_unless_the_stage_says_how_fast_they_train(fitted: Path, tmp_path: Path) -> None:
    spared = of(fitted, tmp_path / "spared")
    _, said = run(spared)
    assert any(
        "routers ('ridge', weights of about 1e-05) train at 0.0001 of the learning rate" in line for line in said
    )
    assert changed(fitted, spared) < KEPT
    told = of(fitted, tmp_path / "told", rates={"router": 1.0})
    _, said = run(told)
    assert any("lost at once; to keep it, set the stage's rates: {router: 0.0001}" in line for line in said)
    assert changed(fitted, told) > 1
    alone = of(fitted, tmp_path / "alone", train=["router"])
    _, said = run(alone)
    assert any("lost at once" in line for line in said), "its learning rate is the routers' own"
    assert changed(fitted, alone) > 1


def test_a_continued_run_keeps_the_factor_whatever_the_routers_became(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = of(fitted, tmp_path / "whole"), of(fitted, tmp_path / "parts", steps=3)
    run(whole)
    run(parts.model_copy(update={"data": whole.data}))
    longer = of(fitted, tmp_path / "parts").model_copy(update={"data": whole.data})
    monkeypatch.setattr("upcycle.trainers.run.stage.fitted_routers", lambda *_: None)  # as if they had grown
    run(longer)
    first, second = (latest(Path(recipe.output)) for recipe in (whole, longer))
    assert first
    assert second
    assert first.state["router_factor"] == second.state["router_factor"] == 1e-4
