"""What may change when a run is continued, and what may not: every key of the recipe is on one side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from training_runs import recipe_for, run, steps

from upcycle.errors import UpcycleError, UsageError
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.recipe.training_recipe import StageRecipe, TrainRecipe
from upcycle.trainers.run.continuation import accepted_changes
from upcycle.trainers.run.step import Stepper
from upcycle.trainers.run.step_reports import read_log

Model = Callable[[str], Path]


class Saved:
    """A checkpoint as far as it is asked here: after two of six steps of the first stage."""

    folder = Path("run/checkpoints/step-00000002")

    def __init__(self, recipe: TrainRecipe) -> None:
        told = recipe.model_dump(mode="json")
        self.state = {"identity": {"model": "weights"}, "recipe": told, "stage": 0, "stage_step": 2}


def keys(changes: list[Any]) -> list[str]:
    return [change.key for change in changes]


def two_stages(**first: Any) -> TrainRecipe:
    stages = [
        {"name": "one", "steps": 6, "learning_rate": 1e-3, **first},
        {"name": "two", "steps": 2, "learning_rate": 1e-3},
    ]
    return recipe_of(stages=stages)


def recipe_of(**changes: Any) -> TrainRecipe:
    content = {
        "model": "m",
        "output": "run",
        "data": "demo",
        "stages": {"name": "one", "steps": 6, "learning_rate": 1e-3},
    }
    return TrainRecipe.model_validate({**content, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"clip": 0.5}, ["clip"]),
        ({"bad_steps": 9, "saving": {"every": 7}}, ["saving.every", "bad_steps"]),
        ({"log": {"validation": 5, "trackers": ["wandb"]}}, ["log.validation", "log.trackers"]),
        ({"micro_batch": 2, "zero": {"stage": 1}, "output": "moved"}, ["output", "micro_batch", "zero.stage"]),
        ({"data": {"domains": {"text": "demo"}, "validation": {"tokens": 99}}}, ["data.validation.tokens"]),
    ],
)
def test_what_a_run_may_change(changes: dict[str, Any], expected: list[str]) -> None:
    found = accepted_changes(Saved(recipe_of()), recipe_of(**changes), "weights")  # type: ignore[arg-type]
    assert keys(found) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"learning_rate": 1e-4}, ["learning_rate"]),
        ({"steps": 9}, ["steps"]),
        ({"steps": None, "tokens": 8 * 512 * 7}, ["steps", "tokens"]),
        ({"schedule": {"kind": "wsd", "warmup": 1}}, ["schedule.kind", "schedule.warmup"]),
        ({"learning_rate": None, "preset": {"name": "nvidia", "dense_peak": 1}}, ["learning_rate", "preset"]),
        ({"rates": {"router": 0.1}, "weight_decay": 0.0}, ["rates.router", "weight_decay"]),
        ({"losses": {"switch_balance": {"coefficient": 0.1}}}, ["losses.switch_balance"]),
        ({"control": {"noise": "fixed", "jitter": 0.1}}, ["control.jitter", "control.noise"]),
    ],
)
def test_what_a_stage_may_change(changes: dict[str, Any], expected: list[str]) -> None:
    found = accepted_changes(Saved(two_stages()), two_stages(**changes), "weights")  # type: ignore[arg-type]
    assert keys(found) == [f"stages.one.{key}" for key in expected]


def test_stages_that_have_not_begun_are_free() -> None:
    saved: Any = Saved(two_stages())
    assert keys(accepted_changes(saved, recipe_of(), "weights")) == ["stages.two"]
    more = two_stages().model_dump(mode="json")["stages"]
    more[1] |= {"train": ["router"], "data": {"domains": {"text": "prose"}}}
    more.append({"name": "three", "steps": 1, "learning_rate": 1.0})
    assert keys(accepted_changes(saved, recipe_of(stages=more), "weights")) == ["stages.two", "stages.three"]
    saved.state["stage"] = 1  # the first is done: its length is a fact
    with pytest.raises(UsageError, match=r"another run: stages\.one\.steps was 6 and is now 7"):
        accepted_changes(saved, two_stages(steps=7), "weights")
    with pytest.raises(UsageError, match=r'stages\.two was "two" and is now nothing|stages\.two was'):
        accepted_changes(saved, recipe_of(), "weights")


REFUSED = [
    ({"seed": 1}, "seed was 0 and is now 1"),
    ({"length": 64, "dtype": "bfloat16"}, 'length was 512 and is now 64; dtype was "float32" and is now "bfloat16"'),
    ({"optimizer": {"betas": [0.9, 0.99]}}, r"optimizer\.betas was \[0\.9, 0\.95\] and is now \[0\.9, 0\.99\]"),
    ({"data": {"domains": {"text": "prose"}}}, r'data\.domains\.text\.text was \["demo"\] and is now \["prose"\]'),
    ({"data": {"domains": {"text": "demo", "b": "prose"}}}, r"data\.domains\.b was nothing and is now \{"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_another_run_is_refused_with_all_that_differs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"step-00000002 is a checkpoint of another run: .*{message}") as error:
        accepted_changes(Saved(recipe_of()), recipe_of(**changes), "weights")  # type: ignore[arg-type]
    assert "learning rates" in str(error.value.hint)
    assert "--restart" in str(error.value.hint)


def test_other_weights_fewer_steps_and_learned_noise_are_refused() -> None:
    saved: Any = Saved(two_stages())
    with pytest.raises(UsageError, match='model was "weights" and is now "others"'):
        accepted_changes(saved, two_stages(), "others")
    with pytest.raises(UsageError, match=r"'one' has 1 steps in the recipe, but .* has already done 2"):
        accepted_changes(saved, two_stages(steps=1), "weights")
    with pytest.raises(UsageError, match=r'stages\.one\.control\.noise was "none" and is now "learned"'):
        accepted_changes(saved, two_stages(control={"noise": "learned"}), "weights")
    with pytest.raises(UsageError, match=r'stages\.one\.train was \["all"\] and is now \["router"\]'):
        accepted_changes(saved, two_stages(train=["router"]), "weights")


def named(model: type[BaseModel], path: str = "") -> Iterator[str]:
    for name in model.model_fields:
        yield f"{path}{name}"


def test_the_list_names_only_keys_that_there_are() -> None:
    """A key that was renamed must not fall out of the list in silence."""
    from upcycle.trainers.run import continuation

    for pattern in continuation._RUN:
        assert pattern.partition(".")[0] in set(named(TrainRecipe)), pattern
    for pattern in (*continuation._STAGE, *continuation._LENGTH):
        assert pattern.partition(".")[0] in set(named(StageRecipe)), pattern


@pytest.mark.long
def test_a_run_that_was_not_finite_goes_on_as_its_hint_says(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, bad_steps=0)
    original = Stepper._losses

    def broken(self: Stepper, engine: Any, batch: Any, weight: float, progress: float, *more: Any) -> Any:
        loss, *others = original(self, engine, batch, weight, progress, *more)
        return (loss * float("nan") if progress >= 0.5 else loss), *others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "_losses", broken)
        with pytest.raises(UpcycleError, match="not finite") as error:
            run(recipe)
    assert "lower learning_rate or clip, raise bad_steps" in str(error.value.hint)
    changed = recipe.model_dump(mode="json") | {"clip": 0.1, "bad_steps": 2}
    changed["stages"][0] |= {"learning_rate": 0.001, "steps": 8}
    result, said = run(TrainRecipe.model_validate(changed))
    assert result.step == 8
    assert "changed: clip was 1.0 and is now 0.1" in said
    assert [line["learning_rate"] for line in steps(recipe)[2:]] != [
        line["learning_rate"] for line in steps(recipe)[:2]
    ]
    assert all(line["learning_rate"] <= 0.001 for line in steps(recipe)[2:])
    logged = [line for line in read_log(Path(recipe.output) / "log.jsonl") if line["kind"] == "change"]
    expected = {"clip", "bad_steps", "stages.heal.learning_rate", "stages.heal.steps"}
    assert {line["key"] for line in logged} == expected
    saved = latest(Path(recipe.output))
    assert saved is not None
    assert {change["key"] for change in saved.state["changes"]} == expected
    assert any("the schedule now spans 8 steps: the learning rate of step 3 is" in line for line in said)


@pytest.mark.long
def test_a_mended_file_is_said_and_logged(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 2})
    run(recipe)
    text = tmp_path / "text.jsonl"
    text.write_text(text.read_text() + json.dumps({"text": "more"}) + "\n")
    more = recipe.model_dump(mode="json")
    more["stages"][0]["steps"] = 4
    result, said = run(TrainRecipe.model_validate(more))
    assert result.step == 4
    (warning,) = [line for line in said if line.startswith("warning: domain 'cats'")]
    assert "text.jsonl changed since the checkpoint was saved" in warning
    logged = [line["message"] for line in read_log(Path(recipe.output) / "log.jsonl") if line["kind"] == "warning"]
    assert [f"warning: {message}" for message in logged] == [warning]
