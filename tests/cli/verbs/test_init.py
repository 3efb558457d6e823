"""``upcycle init``: five answers become a recipe that can be carried out, and the commands that follow."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import upcycle
from upcycle.cli.main import cli
from upcycle.cli.verbs.tools import init
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import parse_yaml
from upcycle.planning.drafting.first_recipe import GOALS, LLAMA_CPP, RUNNERS, Answers, commands, draft, recipes_for
from upcycle.registry import load
from upcycle.trainers.recipe.training_recipe import read_train_recipe

ROOT = Path(__file__).parents[3]


def run(*arguments: str, **how: Any) -> Any:
    return CliRunner().invoke(cli, ["init", *arguments], catch_exceptions=False, **how)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs.txt").write_text("Some text. " * 50)
    return tmp_path


def test_engines_and_goals_are_those_of_the_options() -> None:
    assert (init._GOALS, init._RUNNERS) == (GOALS, RUNNERS)


def test_the_targets_of_llama_cpp_are_those_that_were_measured() -> None:
    rows = (ROOT / "docs" / "measured" / "serving_targets.md").read_text(encoding="utf-8").splitlines()
    same = [re.findall(r"`(\w+)`", row)[0] for row in rows if "| same |" in row]
    assert same == list(LLAMA_CPP)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("engine", RUNNERS)
@pytest.mark.parametrize("train", [False, True])
def test_every_draft_is_a_recipe_that_can_be_planned(goal: Any, engine: Any, train: bool) -> None:
    answers = Answers("demo", goal, ("docs.txt", "other file's.txt"), train, engine)
    targets = load("family", "llama").targets
    for name in recipes_for(answers):
        recipe = parse_yaml(draft(answers, name, targets).text, "draft", error=UsageError)
        assert recipe["source"] == "demo"
        if goal == "speed":
            assert recipe["calibration"]["text"] == ["docs.txt", "other file's.txt"]
        plan = upcycle.plan(**recipe)
        assert plan.target in LLAMA_CPP or engine != "llama.cpp"
        assert (plan.flops_per_token < plan.flops_per_token_dense) == (goal == "speed")
    following = commands(answers, "mine.yaml")
    assert following[0] == "upcycle convert mine.yaml OUT"
    assert any(line.startswith("upcycle train") for line in following) == train
    short = [line for line in commands(answers, "mine.yaml", 64) if line.startswith("upcycle train")]
    assert all(line.endswith("--set length=64") for line in short)
    assert (following[-1] == f"upcycle verify {'RUN/model' if train else 'OUT'} --with {engine}") == (
        engine != "transformers"
    )


def test_questions_are_asked_where_no_option_answers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "has_terminal", lambda: True)
    result = run("--goal", "capacity", input="demo\ndocs.txt\ny\nvllm\n")
    assert result.exit_code == 0, result.output
    assert [line[:3] for line in result.stderr.splitlines() if re.match(r"\d/4", line)] == ["1/4", "2/4", "3/4", "4/4"]
    assert parse_yaml((here / "upcycle.yaml").read_text(), "it", error=UsageError)["method"] == "virtual_groups"
    assert "next  upcycle convert upcycle.yaml OUT\n" in result.stdout
    assert "upcycle verify RUN/model --with vllm" in result.stdout
    assert "--set data=docs.txt" in result.stdout


def test_the_training_that_is_named_can_be_begun(here: Path) -> None:
    (here / "rows.jsonl").write_text('{"text": "Some text."}\n{"text": "Other text."}\n')
    for texts in (("docs.txt",), ("rows.jsonl",), ("docs.txt", "rows.jsonl")):
        for goal in GOALS:
            (line,) = [
                one
                for one in commands(Answers("demo", goal, texts, True), "mine.yaml", 512)
                if " train " in one and "plan" not in one
            ]
            words = line.split()
            overrides = dict(word.partition("=")[::2] for word in words if "=" in word)
            recipe = read_train_recipe(Path(words[2]), {"model": "demo", "output": "RUN", **overrides})
            assert [text for domain in recipe.data.domains for text in domain.text] == list(texts)
            assert recipe.data.validation.fraction


def test_without_a_terminal_it_says_what_to_pass(here: Path) -> None:
    with pytest.raises(UsageError, match="no terminal to ask on") as raised:
        run()
    assert "--model SOURCE" in str(raised.value.hint)
    assert not (here / "upcycle.yaml").exists()


def test_a_file_that_is_there_stays(here: Path) -> None:
    (here / "mine.yaml").write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.yaml is there already"):
        run("mine.yaml", "--model", "demo")
    assert (here / "mine.yaml").read_text() == "mine"


def test_json_has_the_recipe_and_the_commands(here: Path) -> None:
    told = json.loads(run("its own.yaml", "--model", "demo", "--json").stdout)
    assert told["recipe"] == parse_yaml((here / "its own.yaml").read_text(), "it", error=UsageError)
    assert told["recipe"]["calibration"]["text"] == ["self"]
    assert told["commands"] == ["upcycle convert 'its own.yaml' OUT", "upcycle report OUT"]


@pytest.mark.parametrize("name", ["123", "yes", "a: b", "it's", "null"])
def test_names_that_yaml_would_take_for_something_else(name: str) -> None:
    recipe = parse_yaml(draft(Answers(name, texts=(name,)), "split_75", ()).text, "draft", error=UsageError)
    assert (recipe["source"], recipe["calibration"]["text"]) == (name, [name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "demo", "--text", "nothing.txt"), "no such text file: nothing.txt"),
        (("--model", "nowhere"), "no such file or folder: nowhere"),
    ],
)
def test_nothing_is_written_where_an_answer_is_wrong(here: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(*arguments)
    assert [path.name for path in here.iterdir()] == ["docs.txt"]
