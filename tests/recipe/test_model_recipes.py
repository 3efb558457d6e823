"""Recipes for single models: they are found by name, and their numbers are those of upcycle plan on real configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from model_recipe_table import HEADER, model_configs, model_entry

from upcycle.cli.main import cli, main
from upcycle.files.formats.parsing import dump_yaml, parse_yaml, read_yaml
from upcycle.formatting import count
from upcycle.recipe.conversion_recipe import parse_recipe
from upcycle.recipe.model_recipes import model_recipes, table_file
from upcycle.recipe.shipped_recipes import conversion_recipe, names_of_recipes

MODELS = model_configs()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments))


def test_every_model_has_its_recipes_and_the_table_is_as_it_was_written() -> None:
    table = read_yaml(table_file())
    assert list(table) == list(MODELS)
    assert f"For {len(MODELS)} models that many people have" in (Path(__file__).parents[2] / "README.md").read_text()
    assert table_file().read_text() == HEADER + dump_yaml(table)
    for entry in table.values():
        assert {kind.rstrip("0123456789.bm") for kind in entry["recipes"]} == {"split", "upcycle"}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("model", MODELS)
def test_the_numbers_are_those_of_the_plan(model: str) -> None:
    told = MODELS[model]
    assert read_yaml(table_file())[model] == model_entry(told), "run: make recipes"


@pytest.mark.parametrize("model", MODELS)
def test_configurations_have_as_many_parameters_as_was_published(model: str) -> None:
    told = MODELS[model]
    split = read_yaml(table_file())[model]["recipes"]["split50"]["plan"]["on disk"]
    stored = split.rpartition("dense ")[2].rstrip(")")  # in bfloat16: two bytes a parameter
    amount, unit = stored.split()
    parameters = float(amount) * {"GB": 1e9, "MB": 1e6}[unit] / 2
    published = float(told["parameters"][:-1]) * {"B": 1e9, "M": 1e6}[told["parameters"][-1]]
    digits = len(told["parameters"].rstrip("BM").partition(".")[2])
    unit_size = {"B": 1e9, "M": 1e6}[told["parameters"][-1]]
    rounding = (
        0.5 * 10**-digits * unit_size + 0.005 * parameters
    )  # of both: three digits are printed of the stored bytes
    assert abs(parameters - published) <= rounding, (count(parameters), told["parameters"])


def test_a_recipe_is_that_which_it_is_taken_from_with_what_the_table_changes() -> None:
    table = read_yaml(table_file())
    for recipe in model_recipes().values():
        kind = recipe.name.removeprefix(f"{recipe.model}-")
        entry = table[recipe.model]["recipes"][kind]
        _, general = conversion_recipe(entry["from"]) or ("", {})
        content = parse_yaml(recipe.text, recipe.name)
        assert content == {**general, **entry.get("keys", {}), "source": recipe.source}
        parse_recipe(content, recipe.name)
        assert max(map(len, recipe.text.splitlines())) <= 135
        assert "not predicted" not in recipe.text  # which says nothing of the model


def test_commands_take_it_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    planned = run(
        "plan", "qwen3-0.6b-split50", "--source", "demo", "--json"
    )  # the demo is another model of a known family
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["method"] == "alternating"
    printed = run("recipe", "qwen3-0.6b-split50").stdout
    assert printed == model_recipes()["qwen3-0.6b-split50"].text
    assert parse_yaml(printed, "it")["source"] == "Qwen/Qwen3-0.6B"
    listed = {entry["name"]: entry for entry in json.loads(run("list", "recipes", "--json").stdout)["recipes"]}
    assert set(model_recipes()) <= set(listed)
    assert listed["qwen3-0.6b-split50"]["model"] == "qwen3-0.6b"
    assert "qwen3-0.6b-split50" in names_of_recipes("convert")
    for arguments, wanted in (
        (["plan", "qwen3-0.6b-split5", "--source", "demo"], "did you mean 'qwen3-0.6b-split50'?"),
        (["train", "qwen3-0.6b-split50"], "'qwen3-0.6b-split50' is a recipe of upcycle convert"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert wanted in " ".join(capsys.readouterr().err.split())
    (tmp_path / "qwen3-0.6b-split50").mkdir()  # a folder of that name goes before
    assert conversion_recipe("qwen3-0.6b-split50") is None


def test_without_network_a_model_that_is_not_here_is_said_at_once_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from huggingface_hub import constants

    import upcycle.evaluation.forecast.forecast as slow

    def unwanted(*_: object) -> None:
        raise AssertionError("dear work")

    monkeypatch.setattr(slow, "timed_job", unwanted)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as ended:
        main(["plan", "qwen3-0.6b-split50"])
    assert ended.value.code == 4
    assert "--source FOLDER" in capsys.readouterr().err
