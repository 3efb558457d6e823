"""Models counted from their configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pico_models import PICO_MOE

from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.registry import TARGETS
from upcycle.trainers.forecast.flops import training_flops
from upcycle.trainers.forecast.model_counts import count_model
from upcycle.trainers.routing.stock_routers import moe_layers

Model = Callable[[str], Path]


@pytest.mark.parametrize("name", [name for name, (kind, _) in PICO_MOE.items() if kind in TARGETS])
def test_as_many_weights_as_the_files_hold(pico_moe: Model, name: str) -> None:
    folder = pico_moe(name)
    counts = count_model(read_json(folder / "config.json"), name, 32)
    specs = SafetensorsFolder(folder).specs
    biases = sum(spec.elements for key, spec in specs.items() if key.endswith("bias") and spec.elements == 4)
    stored = sum(spec.elements for spec in specs.values())
    assert stored - biases <= counts.elements <= stored
    routed = sum(weight.elements for weight in counts.weights if weight.divided)
    biases_of_experts = sum(
        each.experts * (2 * each.width + counts.hidden) for each in counts.moe_layers if name.startswith("gpt_oss")
    )
    assert routed - biases_of_experts == sum(
        3 * each.experts * each.width * counts.hidden for each in counts.moe_layers
    )
    assert {weight.fetched_with for weight in counts.weights if weight.divided} <= {
        weight.fetched_with for weight in counts.weights if weight.part == "router"
    }


def test_widths_and_operations_are_those_of_the_model(stock: Callable[..., Any]) -> None:
    for target, shared in (("mixtral", 0), ("glm4_moe", None)):
        model = stock(target)
        counts = count_model(model.config.to_dict(), target, 16)
        assert counts.flops == training_flops(model, 16)
        (layer,) = {(each.experts, each.top_k, each.width) for each in counts.moe_layers}
        assert layer == (4, 2, 24)
        assert len(counts.moe_layers) == len(moe_layers(model))
        if shared is not None:
            assert {each.shared for each in counts.layers} == {shared}
    first = counts.layers[0]  # GLM-4.5's dense one
    assert (first.experts, first.shared) == (0, model.config.intermediate_size)


def test_a_dense_model_and_the_trained_part_of_a_moe_are_counted(pico: Model, pico_moe: Model) -> None:
    dense = count_model(read_json(pico("llama") / "config.json"), "llama", 32)
    assert (dense.experts, dense.moe_layers, dense.active) == (0, (), dense.elements)
    raw = read_json(pico_moe("mixtral") / "config.json")
    routers = count_model(raw, "m", 32, ["router"])
    assert {weight.part for weight in routers.weights if weight.trained} == {"router"}
    assert routers.flops.weights < count_model(raw, "m", 32).flops.weights
    with pytest.raises(UsageError, match="'nothing' matches no parameter"):
        count_model(raw, "m", 32, ["nothing"])


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(CheckpointError, match="transformers has no 'no_such_model' model"):
        count_model({"model_type": "no_such_model"}, "it", 32)
