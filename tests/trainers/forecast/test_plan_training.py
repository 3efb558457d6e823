"""Plans of training runs: which divisions there are, which is recommended, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("deepspeed")

from upcycle.errors import CheckpointError, UsageError
from upcycle.hardware.accelerators import DEVICES
from upcycle.trainers.forecast.plan_training import plan_training, read_planned
from upcycle.trainers.forecast.ranks_planned import World

Model = Callable[..., Path]
EIGHT = World(DEVICES["H100"], 1, 8)


def keys(model: Path, **changes: Any) -> dict[str, Any]:
    stage = {"tokens": 100_000, "learning_rate": 0.001}
    return {"model": str(model), "stages": stage, "length": 64, "global_batch": 16, "dtype": "bfloat16", **changes}


def test_a_plan_lists_every_division_that_the_trainer_takes(pico_moe: Model) -> None:
    plan = plan_training(keys(pico_moe("mixtral")), EIGHT)
    pairs = [(option.zero_stage, option.expert_parallel) for option in plan.options]
    assert pairs == [(stage, size) for stage in (1, 2, 3) for size in (1, 2, 4)]
    full = plan_training(keys(pico_moe("mixtral"), dtype="float32"), EIGHT)
    assert [option.expert_parallel for option in full.options if option.zero_stage == 0] == [1]
    alone = plan_training(keys(pico_moe("mixtral"), dtype="float32"), replace(EIGHT, per_node=1))
    assert {option.expert_parallel for option in alone.options} == {1}
    assert (plan.steps, plan.tokens) == (98, 98 * 1024)
    assert plan.own is not None
    assert (plan.own.zero_stage, plan.own.expert_parallel) == (1, 1)
    assert not plan.refused


def test_experts_are_planned_as_they_are_trained(pico_moe: Model) -> None:
    recipe = keys(pico_moe("mixtral"), dtype="float32")
    assert plan_training(recipe, EIGHT).counts.implementation == "upcycle"
    assert plan_training({**recipe, "experts": "grouped_mm"}, EIGHT).counts.implementation == "grouped_mm"
    assert plan_training(recipe, "2").counts.implementation == "upcycle"
    assert plan_training({**recipe, "experts": "upcycle_lean"}, EIGHT).counts.implementation == "upcycle_lean"


def test_architectures_that_cannot_be_divided_say_why(pico_moe: Model, pico: Model) -> None:
    plan = plan_training(keys(pico_moe("glm4_moe")), EIGHT)
    assert {option.expert_parallel for option in plan.options} == {1}
    assert "biases on the choice of experts" in plan.refused
    controlled = {"tokens": 100_000, "learning_rate": 0.001, "control": {"jitter": 0.01}}
    assert "has control" in plan_training(keys(pico_moe("mixtral"), stages=controlled), EIGHT).refused
    assert plan_training(keys(pico("llama")), EIGHT).refused == ""


def test_what_fits_is_recommended_and_else_nothing(pico_moe: Model) -> None:
    recipe = keys(pico_moe("mixtral"))
    plan = plan_training(recipe, EIGHT)
    assert plan.recommended is not None
    best = max(option.speed.unoverlapped for option in plan.options if option.fits)
    assert plan.recommended.speed.unoverlapped >= 0.99 * best
    needs = sorted(option.memory.total for option in plan.options)
    tight = replace(DEVICES["H100"], memory=needs[0] / 0.9 + 1)
    only = plan_training(recipe, World(tight, 1, 8)).recommended
    assert only is not None
    assert only.memory.total == needs[0]
    none = plan_training(recipe, World(replace(tight, memory=1000), 1, 8))
    assert none.recommended is None
    assert not any(option.fits for option in none.options)


def test_thousands_of_ranks(pico_moe: Model) -> None:
    plan = plan_training(keys(pico_moe("mixtral"), global_batch=8192), "1024x8xH100")
    whole = {option.expert_parallel: option for option in plan.options if option.zero_stage == 3}
    assert set(whole) == {1, 2, 4}
    assert whole[1].memory.optimizer == pytest.approx(12 * plan.counts.elements / 8192)
    json.dumps(plan.as_dict())


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"expert_parallel": 8}, EIGHT, "expert_parallel 8 is more than the 4 experts"),
        ({"expert_parallel": 3}, EIGHT, "expert_parallel 3 does not divide 4 experts"),
        ({"expert_parallel": 4, "global_batch": 18}, World(DEVICES["H100"], 1, 6), "does not divide 6 ranks"),
        ({"global_batch": 12}, EIGHT, "global_batch 12 is not a multiple of micro_batch 1 x 8 ranks"),
        ({"expert_parallel": 2, "zero": {"stage": 0}, "dtype": "float32"}, EIGHT, "zero.stage 0 cannot divide experts"),
        ({"zero": {"stage": 0}}, EIGHT, "zero.stage 0 would add up gradients of 8 ranks"),
        ({"model": "nowhere"}, EIGHT, "no such file or folder: nowhere"),
        (
            {"expert_parallel": 2, "stages": {"steps": 1, "learning_rate": 1, "control": {"jitter": 0.1}}},
            EIGHT,
            "has control",
        ),
        ({}, "8xH900", "unknown device 'H900'"),
    ],
)
def test_plans_that_cannot_run_are_refused(pico_moe: Model, changes: dict[str, Any], world: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        plan_training({**keys(pico_moe("mixtral")), **changes}, world)
    assert error.value.hint or "zero.stage" in error.value.message


def test_no_weight_is_read_and_headers_are_compared(pico_moe: Model, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico_moe("mixtral"), tmp_path / "moe"))
    assert plan_training(keys(folder), EIGHT).warnings == ()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (warning,) = plan_training(keys(folder), EIGHT).warnings
    assert "and the weight files hold" in warning
    (folder / "model.safetensors").unlink()
    assert plan_training(keys(folder), EIGHT).warnings == ()  # a configuration is enough
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError):
        plan_training(keys(folder), EIGHT)


def test_warnings_that_from_scratch_is_better(converted: Callable[..., Path], pico_moe: Model, pico: Model) -> None:
    out = converted("moe4", experts=4)
    recipe = keys(out, stages={"tokens": 10_000_000, "learning_rate": 0.001})
    assert not plan_training(recipe, EIGHT, dense_tokens=1e15).warnings
    (warning,) = plan_training(recipe, EIGHT, dense_tokens=1e6).warnings
    assert "Skywork" in warning
    split = keys(pico_moe("mixtral"))
    with pytest.raises(UsageError, match="does not say what it was converted from") as error:
        plan_training(split, EIGHT, dense_tokens=1e6)
    assert error.value.hint == "give --dense FOLDER"
    assert plan_training(split, EIGHT, dense_tokens=1e3, dense=str(pico("llama"))) is not None


def test_a_parent_costs_memory_and_time(converted: Callable[..., Path], pico: Model) -> None:
    stage = {"tokens": 100_000, "learning_rate": 0.001, "distillation": {}}
    recipe = keys(converted("moe", experts=2), stages=stage)
    with_it = plan_training(recipe, EIGHT).options[0]
    without = plan_training({**recipe, "stages": {**stage, "distillation": None}}, EIGHT).options[0]
    assert with_it.memory.parent > 0
    assert with_it.memory.total > without.memory.total
    assert with_it.speed.compute < without.speed.compute


def test_a_recipe_may_leave_out_what_a_plan_need_not_know(pico_moe: Model, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stages: {steps: 2, learning_rate: 0.1}\nglobal_batch: 8\n")
    told = read_planned(path, {"model": str(pico_moe("mixtral")), "length": 16})
    assert (told.output, told.length) == ("RUN", 16)
