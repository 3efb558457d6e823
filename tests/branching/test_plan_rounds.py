"""What the rounds of Branch-Train-Merge do, step by step, and which recipes are refused before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from upcycle.branching.plan_rounds import plan_rounds
from upcycle.branching.rounds_recipe import parse_rounds_recipe, read_rounds_recipe
from upcycle.errors import UsageError
from upcycle.recipe.conversion_recipe import Recipe
from upcycle.recipe.shipped_recipes import shipped
from upcycle.trainers.recipe.training_recipe import TrainRecipe

TRAINING = {"length": 32, "stages": [{"steps": 2, "learning_rate": 0.001}]}


def content(**changes: Any) -> dict[str, Any]:
    return {
        "source": "seed-model",
        "output": "forest",
        "domains": {"law": "law.txt", "code": {"text": "code.txt", "weight": 0.75}, "news": "news.txt"},
        "rounds": [["law", "code"], ["code", "news"]],
        "training": TRAINING,
        **changes,
    }


def steps(**changes: Any) -> dict[str, Any]:
    return {step.name: step for step in plan_rounds(parse_rounds_recipe(content(**changes), "test"))}


def test_branches_begin_as_the_merge_of_the_round_before() -> None:
    found = steps()
    assert {name: step.reads for name, step in found.items()} == {
        "round-1/law": ("seed",),
        "round-1/code": ("seed",),
        "round-1/merge": ("seed", "round-1/law", "round-1/code"),
        "round-2/code": ("round-1/merge",),
        "round-2/news": ("round-1/merge",),
        # the newest model of every domain: that of law is a round older
        "round-2/merge": ("seed", "round-1/law", "round-2/code", "round-2/news"),
    }
    first, second = found["round-1/law"].recipe, found["round-2/news"].recipe
    assert isinstance(first, TrainRecipe)
    assert isinstance(second, TrainRecipe)
    assert first.model == "seed-model"
    assert second.model == str(Path("forest").absolute() / "round-1" / "merge")
    assert [domain.name for domain in second.data.domains] == ["news"]
    merged = found["round-2/merge"].recipe
    assert isinstance(merged, Recipe)
    assert [Path(source.name).parts[-3:] for source in merged.sources] == [
        ("round-1", "law", "model"),
        ("round-2", "code", "model"),
        ("round-2", "news", "model"),
    ]


def test_branches_begin_as_a_mean_by_posteriors() -> None:
    found = steps(branch="posteriors", sample=256, most=2)
    assert found["round-2/news-begins"].reads == ("seed", "round-1/law", "round-1/code")
    assert found["round-2/news"].reads == ("round-2/news-begins",)
    recipe = found["round-2/news-begins"].recipe
    assert isinstance(recipe, Recipe)
    assert recipe.calibration.texts == ["news.txt"]
    assert (recipe.calibration.tokens, recipe.method, recipe.parameters) == (256, "branch_train_merge", {"most": 2})


def test_a_forest_of_one_is_its_own_merge() -> None:
    found = steps(domains={"law": "law.txt"}, rounds=3)
    assert {name: step.reads for name, step in found.items()} == {
        "round-1/law": ("seed",),
        "round-2/law": ("round-1/law",),
        "round-3/law": ("round-2/law",),
    }


def test_the_last_forest_becomes_a_moe_that_is_tuned_on_all_domains() -> None:
    last = {"method": "branch_train_mix", "router": "domain_ridge", "top_k": 2}
    found = steps(last=last, tuning=TRAINING, domains={"law": "law.txt", "code": "code.txt"}, rounds=1)
    mixed, tuned = found["last"].recipe, found["tuned"].recipe
    assert isinstance(mixed, Recipe)
    assert isinstance(tuned, TrainRecipe)
    assert [source.texts for source in mixed.sources] == [["law.txt"], ["code.txt"]]  # samples for the router
    assert tuned.model == str(found["last"].model)
    assert [domain.name for domain in tuned.data.domains] == ["law", "code"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": [["law", "cod"]]}, "did you mean 'code'?"),
        ({"rounds": [["law", "code"]]}, "'news' is trained in no round"),
        ({"rounds": [["law", "law"], ["code", "news"]]}, "names a domain twice"),
        ({"rounds": [[], ["law", "code", "news"]]}, "round 1 trains no domain"),
        ({"rounds": 0}, "key 'rounds'"),
        ({"domains": {"a/b": "x.txt"}, "rounds": 1}, "'a/b' names folders here"),
        ({"domains": {"merge": "x.txt"}, "rounds": 1}, "'merge' names folders here"),
        ({"training": {**TRAINING, "model": "x"}}, "training: 'model' cannot be set here"),
        ({"training": {**TRAINING, "data": {"domains": {"x": "y"}}}}, "training: data has no domains here"),
        ({"training": {**TRAINING, "lenght": 3}}, "training: unknown key 'lenght'"),
        ({"training": {**TRAINING, "saving": {"export": False}}}, "saving.export is false"),
        ({"merge": {"method": "branch_train_mix"}}, "does not merge several models into a dense one"),
        ({"merge": {"sources": ["a"]}}, "merge: 'sources' cannot be set here"),
        ({"merge": {"experst": 3}}, "merge: unknown key 'experst'"),
        ({"last": {"method": "sparse_upcycling"}}, "takes one source"),
        ({"tuning": TRAINING}, "there is no last"),
        ({"most": 2}, "for branch: posteriors"),
        (
            {
                "branch": "posteriors",
                "domains": {"law": {"text": "a.jsonl", "prompt": "p", "response": "r"}},
                "rounds": 1,
            },
            "posteriors are decided by text",
        ),
        ({"brnch": "merge"}, "did you mean 'branch'?"),
    ],
)
def test_bad_recipes_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_rounds(parse_rounds_recipe(content(**changes), "rounds.yaml"))
    assert said in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("name", shipped("grow"))
def test_every_shipped_recipe_is_one_of_rounds(name: str) -> None:
    domains = {"domains.law": "law.txt", "domains.code": "code.txt"}
    found = plan_rounds(read_rounds_recipe(Path(name), {"source": "demo", "output": "out", **domains}))
    assert [step.name for step in found][:2] == ["round-1/law", "round-1/code"]
    with pytest.raises(UsageError, match="domains"):
        read_rounds_recipe(Path(name), {"source": "demo", "output": "out"})


def test_options_are_laid_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rounds.yaml"
    path.write_text(
        "source: a\noutput: b\ndomains: {law: x.txt}\nrounds: 2\ntraining: {stages: [{steps: 1}, {steps: 2}]}\n"
        "last: {method: branch_train_mix}\ntuning: {stages: [{steps: 5}]}\n"
    )
    laid = {"source": "c", "domains.law.separator": "--", "training.seed": 3, "domains.code": "y.txt"}
    found = read_rounds_recipe(
        path, {**laid, "training.stages.1.steps": 7, "tuning.stages.steps": 9, "merge.dtype": "float32"}
    )
    assert (found.source, found.domains[0].text, found.domains[0].separator) == ("c", ["x.txt"], "--")
    assert (found.domains[1].text, found.rounds) == (["y.txt"], [["law", "code"]] * 2)
    assert found.training == {"stages": [{"steps": 1}, {"steps": 7}], "seed": 3}
    assert (found.tuning, found.merge) == ({"stages": [{"steps": 9}]}, {"dtype": "float32"})
    for wrong, said in (
        ("training.stages.steps", r"^training\.stages\.steps: there is no 'steps'"),
        ("training.stages.5.steps", r"^training\.stages\.5\.steps: there is no '5'"),
        ("source.x", "key 'source'"),
    ):
        with pytest.raises(UsageError, match=said):
            read_rounds_recipe(path, {wrong: 1})
    with pytest.raises(UsageError, match="no such recipe"):
        read_rounds_recipe(tmp_path / "none.yaml")


def test_keys_of_parts_are_set_as_in_recipes_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "rounds.yaml"
    path.write_text(
        "source: a\noutput: b\ndomains: {law: x.txt}\nrounds: 1\ntraining: {stages: {steps: 1, learning_rate: 1.0}}\n"
        "last: {method: branch_train_mix, router: random}\n"
    )
    found = read_rounds_recipe(path, {"training.stages.train.steps": 5, "last.router.parameters.std": 0.1})
    assert found.training["stages"] == [{"steps": 5, "learning_rate": 1.0}]
    assert found.last == {"method": "branch_train_mix", "router": {"name": "random", "parameters": {"std": 0.1}}}
