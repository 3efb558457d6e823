"""Every recipe in configs/train trains: a few steps on a pico model, small batches, otherwise as it is shipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_runs import run, steps, write_text

import upcycle
from upcycle.trainers.recipe import parse_train_recipe

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for path in (ROOT / "configs" / "train").glob("*.yaml") if path.stem != "demo_model")
DENSE = {"d2dmoe_sparsify"}
SMALL = {"length": 32, "global_batch": 4, "micro_batch": 2, "dtype": "float32", "zero": {}}


@pytest.fixture(scope="module")
def half(pico: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random split of the pico Llama, half of which runs."""
    folder = tmp_path_factory.mktemp("half") / "moe"
    settings: dict[str, Any] = {"method": "random_split", "experts": 4, "top_k": 2, "verification": {"enabled": False}}
    upcycle.convert(str(pico("llama")), folder, **settings)
    return folder


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_it_trains(path: Path, pico: Callable[[str], Path], half: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text()) | SMALL
    content["log"] = {**content.get("log", {}), "peak_tflops": 0.05}
    content["saving"] = {"export": path.stem in DENSE}
    for stage in content["stages"]:
        stage.pop("tokens", None)
        stage["steps"] = 2
        for schedule in (stage.get("schedule"), stage.get("preset")):
            if schedule:
                schedule["warmup"] = 0
    model = pico("llama") if path.stem in DENSE else half
    data = {"domains": {"cats": write_text(tmp_path / "text.jsonl")}, "cache": str(tmp_path / "cache")}
    data["validation"] = {"fraction": 0.1, "tokens": 64}
    content |= {"model": str(model), "output": str(tmp_path / "run"), "data": data}
    recipe = parse_train_recipe(content, str(path))
    result, _ = run(recipe)
    found = steps(recipe)
    assert len(found) == 2 * len(recipe.stages)
    assert all(line["applied"] and line["gradient_norm"] > 0 for line in found)
    assert math.isfinite(result.validation["cats"])
    for stage in recipe.stages:
        named = {f"loss/{name}" for name in stage.losses}
        taught = stage.distillation
        named |= {"loss/kl"} if taught and taught.logits else set()
        named |= {"loss/ffn"} if taught and taught.ffn else set()
        named |= {"loss/prior_approximate"} if taught and taught.prior_approximate else set()
        named |= {"loss/output_norms"} if taught and taught.output_norms else set()
        lines = [line for line in found if line["stage"] == stage.name]
        assert {key for key in lines[0] if key.startswith("loss/")} == named
    if path.stem in DENSE:
        from upcycle.stock import load_model

        assert load_model(Path(str(result.model))).config.hidden_act == "relu"
