"""Training recipes: the forms that are read, and faults that name their key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from upcycle.errors import UsageError
from upcycle.trainers.recipe.training_recipe import TrainRecipe, parse_train_recipe, read_train_recipe

ROOT = Path(__file__).parents[3]
SHIPPED = sorted(path for path in (ROOT / "configs" / "train").glob("*.yaml") if path.stem != "demo_model")
BASE: dict[str, Any] = {
    "model": "moe",
    "output": "run",
    "data": "demo",
    "stages": [{"steps": 10, "learning_rate": 1e-3}],
}


def test_a_short_recipe_and_its_dump() -> None:
    recipe = parse_train_recipe(BASE, "r")
    assert recipe.stages[0].train == ["all"]
    assert recipe.tokens_per_step == 8 * 512
    assert parse_train_recipe(yaml.safe_load(recipe.dump()), "dump") == recipe


def test_tokens_are_rounded_up_to_steps() -> None:
    recipe = parse_train_recipe({**BASE, "stages": {"tokens": 4097, "learning_rate": 1e-3}}, "r")
    assert recipe.steps_of(recipe.stages[0]) == 2


def test_presets_set_rate_and_schedule() -> None:
    stage = {"steps": 10, "preset": {"name": "nvidia_half", "dense_peak": 2e-4, "warmup": 2}, "rates": {"router": 3.0}}
    recipe = parse_train_recipe({**BASE, "stages": [stage]}, "r")
    rates, schedule = recipe.rate_and_schedule(recipe.stages[0])
    assert (rates.learning_rate, rates.router) == (1e-4, 3.0)
    assert (schedule.kind, schedule.floor, schedule.warmup, schedule.steps) == ("cosine", 0.2, 2, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lenght": 3}, "unknown key 'lenght'"),
        ({"stages": []}, "stages"),
        ({"stages": [{"learning_rate": 1e-3}]}, "needs either steps or tokens"),
        ({"stages": [{"steps": 3, "tokens": 3, "learning_rate": 1e-3}]}, "needs either steps or tokens"),
        ({"stages": [{"steps": 3}]}, "needs either learning_rate or preset"),
        (
            {"stages": [{"steps": 3, "learning_rate": 1, "losses": {"switch_balanc": {}}}]},
            "did you mean 'switch_balance'",
        ),
        ({"stages": [{"steps": 3, "preset": {"name": "nvidai", "dense_peak": 1}}]}, "did you mean 'nvidia'"),
        ({"stages": [{"steps": 3, "learning_rate": 1, "schedule": {"warmup": 3}}]}, "warmup 3 must be less than its 3"),
        ({"stages": [{"steps": 3, "learning_rate": 1, "name": "a/b"}]}, "name"),
        ({"stages": [{"steps": 3, "learning_rate": 1}] * 2}, "two are called 'train'"),
        ({"global_batch": 6, "micro_batch": 4}, "not a multiple of micro_batch 4"),
        ({"optimizer": {"name": "adamq"}}, "key 'optimizer.name'"),
        ({"zero": {"stage": 4}}, "key 'zero.stage'"),
        ({"zero": {"stage": 0}, "expert_parallel": 2}, "zero.stage 0 cannot divide experts"),
        ({"zero": {"stage": 2, "offload_weights": True}}, "offload_weights needs zero.stage 3"),
        ({"zero": {"stages": 2}}, "unknown key 'zero.stages'"),
        ({"data": {"domains": {"a": {"text": "x", "weight": 0.5}, "b": {"text": "y", "weight": 0.6}}}}, "sum to 1.1"),
        ({"log": {"trackers": ["tensorbord"]}}, "log.trackers"),
    ],
)
def test_faults_name_their_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse_train_recipe({**BASE, **change}, "r.yaml")
    assert error.value.exit_code == 2
    assert error.value.message.startswith("r.yaml")


def test_keys_are_laid_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(BASE))
    assert read_train_recipe(path, {"zero.stage": 3, "length": 64}).zero.stage == 3
    laid = read_train_recipe(
        path, {"stages.0.steps": 3, "stages.0.schedule.kind": "wsd", "stages.0.losses.router_z": {}}
    )
    assert (laid.stages[0].steps, laid.stages[0].schedule.kind) == (3, "wsd")
    assert laid.stages[0].losses == {"router_z": {}}
    path.write_text(yaml.safe_dump({**BASE, "stages": [{"name": "heal", "steps": 1, "learning_rate": 1}]}))
    assert read_train_recipe(path, {"stages.heal.learning_rate": 0.5}).stages[0].learning_rate == 0.5
    with pytest.raises(UsageError, match=r"stages\.other\.steps: there is no 'other'") as error:
        read_train_recipe(path, {"stages.other.steps": 1})
    assert error.value.hint == "use one of heal"
    with pytest.raises(UsageError, match="no such recipe"):
        read_train_recipe(tmp_path / "other.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    content = {"model": "moe", "output": "run", "data": "demo", **yaml.safe_load(text)}
    recipe = parse_train_recipe(content, str(path))
    for stage in recipe.stages:
        recipe.rate_and_schedule(stage)


def test_every_key_has_a_description() -> None:
    from pydantic import BaseModel

    def look(model: type[BaseModel], seen: set[type]) -> None:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner not in seen:
                seen.add(inner)
                look(inner, seen)

    look(TrainRecipe, set())


@pytest.mark.parametrize(
    ("content", "key", "value", "found"),
    [
        (
            {"data": "a.jsonl"},
            "data.validation.fraction",
            0.0,
            lambda r: (r.data.domains[0].text, r.data.validation.fraction),
        ),
        ({"data": ["a.jsonl"]}, "data.shuffle", "1MB", lambda r: r.data.shuffle),
        ({"data": "a.jsonl"}, "data.domains.text.column", "body", lambda r: r.data.domains[0].column),
        (
            {"data": {"domains": {"a": "x", "b": "y"}}},
            "data.domains.b.column",
            "body",
            lambda r: r.data.domains[1].column,
        ),
        ({"data": {"domains": {"a": "x"}}}, "data.domains.b", "y", lambda r: [d.name for d in r.data.domains]),
        ({"stages": {"steps": 1, "learning_rate": 1}}, "stages.train.steps", 2, lambda r: r.stages[0].steps),
        ({"stages": {"steps": 1, "learning_rate": 1}}, "stages.0.steps", 2, lambda r: r.stages[0].steps),
        ({"stages": {"steps": 1, "learning_rate": 1}}, "stages.steps", 2, lambda r: r.stages[0].steps),
        (
            {"stages": [{"steps": 1, "learning_rate": 1}]},
            "stages.train.schedule.warmup",
            0,
            lambda r: r.stages[0].steps,
        ),
        ({"stages": [{"steps": 1, "learning_rate": 1}]}, "stages.train.data.shuffle", "1MB", None),
        ({"stages": [{"name": "a", "steps": 1, "learning_rate": 1}]}, "stages.a.steps", 2, lambda r: r.stages[0].steps),
    ],
)
def test_any_key_can_be_set_whatever_form_the_recipe_has(
    tmp_path: Path, content: dict[str, Any], key: str, value: Any, found: Any
) -> None:
    path = tmp_path / "r.yaml"
    whole = {"model": "m", "output": "o", "data": "demo", "stages": {"steps": 1, "learning_rate": 1}, **content}
    path.write_text(yaml.safe_dump(whole))
    if found is None:
        with pytest.raises(UsageError, match=r"data\.domains"):
            read_train_recipe(path, {key: value})
        return
    recipe = read_train_recipe(path, {key: value})
    expected = {
        "data.validation.fraction": (["a.jsonl"], 0.0),
        "data.domains.b": ["a", "b"],
        "stages.train.schedule.warmup": 1,
    }
    assert found(recipe) == expected.get(key, value)


def test_keys_set_one_after_another_and_a_stage_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "output": "o", "stages": {"steps": 1, "learning_rate": 1}}))
    recipe = read_train_recipe(path, {"data": "x.jsonl", "data.validation.fraction": 0})
    assert (recipe.data.domains[0].text, recipe.data.validation.fraction) == (["x.jsonl"], 0)
    with pytest.raises(UsageError, match=r"stages\.heal\.steps: there is no 'heal'") as error:
        read_train_recipe(path, {"data": "x", "stages.heal.steps": 2})
    assert "use one of train" in str(error.value.hint)
