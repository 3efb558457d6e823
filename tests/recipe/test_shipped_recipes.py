"""Recipes that come with upcycle are found by name, whatever else is called so; two sources never pass for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from upcycle.cli.main import cli, main
from upcycle.errors import UsageError
from upcycle.recipe.conversion_recipe import read_recipe
from upcycle.recipe.shipped_recipes import RECIPE_VERBS, needed_recipe_file, recipe_file, shipped, summary
from upcycle.trainers.forecast.plan_training import read_planned


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments))


def fault(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.long
def test_convert_takes_a_shipped_recipe_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for told in ("split_50", "split_50.yaml", str(shipped("convert")["split_50"])):
        planned = run("plan", told, "--source", "demo", "--json")
        assert planned.exit_code == 0, planned.output
        assert json.loads(planned.stdout)["method"] == "alternating"
    dry = run("convert", "split_50", "OUT", "--source", "demo", "--dry-run", "--json")
    assert json.loads(dry.stdout)["method"] == "alternating"
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["demo", "OUT", "--source", "other"], "two sources: 'demo' and --source 'other'"),
        (["split50", "OUT", "--source", "demo"], "did you mean 'split_50'?"),
        (["split50", "OUT"], "did you mean 'split_50'?"),
        (["org/one", "OUT", "--source", "demo"], "two sources: 'org/one' and --source 'demo'"),
        (["demo", "OUT", "--set", "source=org/one"], "two sources: 'demo' and --set source 'org/one'"),
        (["split_50", "OUT", "--source", "demo", "--set", "source=org/one"], "two sources: 'demo' and --set source"),
        (["split_50", "OUT"], "'source'"),
        (["heal_split", "OUT", "--source", "demo"], "'heal_split' is a recipe of upcycle train"),
        (["here", "OUT", "--source", "demo"], "two sources: 'here' and --source 'demo'"),
        (["none.yaml", "OUT", "--source", "demo"], "no such recipe: none.yaml"),
    ],
)
@pytest.mark.parametrize("verb", ["convert", "plan"])
def test_what_cannot_be_meant_is_refused(
    verb: str, arguments: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    told = [verb, *arguments] if verb == "convert" else [verb, *(word for word in arguments if word != "OUT")]
    assert wanted in fault(told, capsys)
    assert not (tmp_path / "OUT").exists()


def test_a_folder_goes_before_a_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "split_50").mkdir()
    assert recipe_file("split_50", "convert") is None
    assert "two sources: 'split_50' and --source 'demo'" in fault(["plan", "split_50", "--source", "demo"], capsys)
    (tmp_path / "split_75.yaml").write_text("experts: 4\n")
    assert recipe_file("split_75.yaml", "convert") == Path("split_75.yaml")


def test_the_source_flag_takes_the_place_of_a_recipes_own_with_its_revision(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("source: org/one\nrevision: abc\nmethod: random_split\n")
    planned = run("plan", str(path), "--source", "demo", "--json")  # a local source with a revision is an error
    assert planned.exit_code == 0, planned.output


def test_train_takes_a_shipped_recipe_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_planned(Path("heal_split"), {"model": "demo"}).stages[0].name == "heal"
    assert needed_recipe_file("heal_split.yaml", "train") == shipped("train")["heal_split"]
    (tmp_path / "mine").write_text("length: 8\n")
    assert needed_recipe_file("mine", "train") == Path("mine")
    assert "did you mean 'heal_split'?" in fault(["train", "heal_spilt"], capsys)
    assert "'split_50' is a recipe of upcycle convert" in fault(["plan", "train", "split_50"], capsys)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="no such recipe: folder"):
        needed_recipe_file("folder", "train")


def test_the_list_has_every_shipped_recipe_with_its_command() -> None:
    listed = json.loads(run("list", "recipes", "--json").stdout)["recipes"]
    assert [(entry["name"], entry["command"]) for entry in listed if entry["model"] is None] == [
        (name, f"upcycle {verb} {name}") for verb in RECIPE_VERBS for name in shipped(verb)
    ]
    assert {"split_50", "heal_split"} <= {entry["name"] for entry in listed}
    assert "demo_model" not in {entry["name"] for entry in listed}
    for verb in RECIPE_VERBS:
        for path in shipped(verb).values():
            assert path.read_text().startswith("# " + summary(path))
            assert read_recipe(path)
