"""Times of shapes: the arithmetic on a clock that the test sets, and real models that run at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from upcycle.evaluation import shape_speed
from upcycle.evaluation.shape_speed import OWN, STOCK, ShapeKey, Times, first_layers, measure_shapes, relative_times
from upcycle.models.random_model import random_model

Pico = Callable[[str], Path]


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def test_a_cut_configuration_has_fewer_layers_and_lists() -> None:
    config = {"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "eos_token_id": [1, 2], "hidden_size": 8}
    assert first_layers(config, 2) == {
        "num_hidden_layers": 2,
        "layer_types": ["a", "b"],
        "eos_token_id": [1, 2],
        "hidden_size": 8,
    }


def test_the_time_of_all_layers_follows_from_two_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, int] = {}

    def clock(configs: dict[str, dict[str, Any]], **_: Any) -> dict[ShapeKey, Times]:
        asked.update({name: config["num_hidden_layers"] for name, config in configs.items()})
        found: dict[ShapeKey, Times] = {}
        for name, config in configs.items():  # 10 s around the layers, 4 s or 1 s in each; a token takes a tenth
            for how, factor in ((STOCK, 1.0), (OWN, 0.5)):
                each = (1.0 if config["moe"] else 4.0) * (factor if config["moe"] else 1.0)
                seconds = 10 + each * config["num_hidden_layers"]
                found[name, how] = Times(seconds, seconds / 10)
        return found

    monkeypatch.setattr(shape_speed, "measure_shapes", clock)
    dense, shape = {"num_hidden_layers": 20, "moe": False}, {"num_hidden_layers": 20, "moe": True}
    for layer_bytes, depths in (
        (1 << 26, {" 2": 2, " 4": 4, "split 2": 2, "split 4": 4}),
        (1, {" 20": 20, "split 20": 20}),
    ):
        asked.clear()
        parent, found = relative_times(dense, {"split": (shape, 15)}, layer_bytes)
        assert asked == depths, "four layers of 64 MB fill every cache, and twenty small ones are all timed"
        assert parent == Times(90.0, 9.0)
        assert found["split", STOCK].prefill == pytest.approx((90 - 15 * 3) / 90)
        assert found["split", STOCK].decode == pytest.approx((90 - 15 * 3) / 90)
        assert found["split", OWN].prefill == pytest.approx((90 - 15 * 3.5) / 90)


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float32), ("qwen3", torch.bfloat16)])
def test_dense_and_moe_shapes_are_timed_in_both_implementations(
    pico: Pico, kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import upcycle

    made: list[Any] = []
    monkeypatch.setattr(shape_speed, "random_model", lambda *told: made.append(random_model(*told)) or made[-1])

    folder = pico(kind)
    upcycle.convert(str(folder), tmp_path / "moe", experts=4, top_k=2, verification={"enabled": False})
    configs = {"dense": config_of(folder), "moe": config_of(tmp_path / "moe")}
    found = measure_shapes(configs, prompt=16, batch=2, rounds=1, dtype=dtype)
    assert [model.dtype for model in made] == [dtype] * 2
    assert all(weight.requires_grad for model in made for weight in model.parameters()), "torch copies frozen matrices"
    assert set(found) == {(name, how) for name in configs for how in (STOCK, OWN)}
    assert found["dense", STOCK] == found["dense", OWN], "it has no experts to compute"
    assert all(times.prefill > 0 and times.decode > 0 for times in found.values())


def test_a_request_is_a_prompt_and_the_tokens_after_it() -> None:
    assert Times(2.0, 0.5).request(4) == 4.0
