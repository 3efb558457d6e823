"""The verbs train and export: what they print, and their exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chats import messages, write_chats
from click.testing import CliRunner
from encoder_cases import text_encoder
from training_runs import recipe_for, write_text

from upcycle.cli.main import cli, main
from upcycle.cli.reference.json_page import JSON_KEYS
from upcycle.cli.verbs.train import _without
from upcycle.errors import UsageError


@pytest.fixture
def recipe(pico_moe: Callable[[str], Path], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 2}).dump())
    return path


def test_train_then_export(recipe: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    trained = runner.invoke(
        cli, ["train", str(recipe), "--json", "--set", "saving.keep=1", "--output", str(tmp_path / "o")]
    )
    assert trained.exit_code == 0, trained.output
    result = json.loads(trained.stdout)
    assert (result["step"], result["stopped"], result["model"]) == (2, False, None)
    assert "heal 1/2  loss " in trained.stderr
    exported = runner.invoke(cli, ["export", str(tmp_path / "o"), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert exported.exit_code == 0, exported.output
    assert "bfloat16, per-expert" in exported.stdout
    again = runner.invoke(cli, ["train", str(recipe), "-q", "--output", str(tmp_path / "o")])
    assert again.exit_code == 0  # nothing is left to do
    assert "2 steps" in again.stdout
    assert not again.stderr


@pytest.fixture
def chats(pico: Callable[[str], Path], tmp_path: Path) -> list[str]:
    """The words of a command that shows twelve rows of conversations."""
    data = write_chats(tmp_path / "chat.jsonl", [messages("Say \x1b[31mred", f"red\n{n}") for n in range(40)])
    words = ["train", "instruct", "--model", str(pico("llama")), "--output", str(tmp_path / "run"), "--show", "12"]
    sets = {"data": data, "data.chat_template": "turns", "data.cache": tmp_path / "cache", "length": 64}
    return [*words, *(word for key, value in sets.items() for word in ("--set", f"{key}={value}"))]


def test_rows_are_shown_as_they_are_trained_on(chats: list[str], tmp_path: Path) -> None:
    shown = CliRunner().invoke(cli, chats)
    assert shown.exit_code == 0, shown.output
    assert "What is between [- and -] is read, but not learned." in shown.stdout
    assert "[-User: Say \ufffd[31mred\nAssistant:-] red\n3<|endoftext|>[-\n-]\n" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert "40 rows, whose conversation is in column 'messages'" in shown.stderr
    assert not (tmp_path / "run").exists()
    printed = json.loads(CliRunner().invoke(cli, [*chats, "--json", "-q"]).stdout)
    assert list(printed) == JSON_KEYS["train --show"].split()
    assert [list(row) for row in printed["rows"]] == [JSON_KEYS["train --show rows"].split()] * 12
    for row in printed["rows"]:
        assert row["tokens"] + row["padding"] == 64
        for document in row["documents"]:
            assert [part["learned"] for part in document] == [False, True, False]
            assert list(document[0]) == JSON_KEYS["train --show documents"].split()


def test_both_answers_of_a_preference_are_shown_as_learned(chats: list[str], tmp_path: Path) -> None:
    asked = [messages(f"What is {n}?", f"It is {n}.") for n in range(20)]
    rows = [{"chosen": chat, "rejected": [chat[0], {**chat[1], "content": "No."}]} for chat in asked]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    domains = json.dumps({"p": {"text": str(path), "chosen": "chosen", "rejected": "rejected"}})
    told = [word for word in chats if not word.startswith("data=")]
    told.pop(told.index("--set"))
    shown = CliRunner().invoke(cli, [*told, "--set", f"data.domains={domains}", "--json", "-q"])
    assert shown.exit_code == 0, shown.output
    for row in json.loads(shown.stdout)["rows"]:
        assert row["learned"]
        answers = [part["text"] for document in row["documents"] for part in document if part["learned"]]
        assert answers[1::2] == [" No.<|endoftext|>"] * (len(answers) // 2)
        assert all(answer.startswith(" It is ") for answer in answers[::2])


def test_rows_of_a_masked_language_model_are_shown(tmp_path: Path) -> None:
    text_encoder("bert", tmp_path / "bert")
    words = ["train", "heal_split", "--model", str(tmp_path / "bert"), "--output", str(tmp_path / "run"), "--show", "2"]
    sets = {"data": write_text(tmp_path / "text.jsonl"), "data.cache": tmp_path / "cache", "length": 64}
    words += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    shown = CliRunner().invoke(cli, [*words, "--json", "-q"])
    assert shown.exit_code == 0, shown.output
    for row in json.loads(shown.stdout)["rows"]:
        assert 0 < row["learned"] < row["tokens"] / 4


def test_rows_longer_than_the_models_context_are_not_shown(chats: list[str]) -> None:
    """The run itself would refuse them, later."""
    shown = CliRunner().invoke(cli, [*chats, "--set", "length=100000", "--set", "stages.0.tokens=1000000000", "-q"])
    assert isinstance(shown.exception, UsageError)
    assert "rows of 100000 tokens are longer than the model's context of" in str(shown.exception)


@pytest.mark.parametrize("columns", ["60", "200"])
def test_in_a_terminal_what_is_not_learned_is_grey(
    chats: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any, columns: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.delenv("NO_COLOR", raising=False)
    with pytest.raises(SystemExit) as ended:
        main([*chats, "-q"])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "[-" not in out
    assert "\x1b[2mGrey text\x1b[0m is read, but not learned." in out
    assert "\x1b[2mUser: Say" in out
    assert "\x1b[2mAssistant:\x1b[0m red\n3<|endoftext|>" in out
    assert "\x1b[31m" not in out, "what a file says does not colour the terminal"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "none.yaml"], 2, "no such recipe: none.yaml"),
        (["train", "RECIPE", "--set", "zero"], 2, "--set takes KEY=VALUE, got 'zero'"),
        (["train", "RECIPE", "--set", "zero.stage=7"], 2, "key 'zero.stage'"),
        (["train", "RECIPE", "--model", "nowhere"], 2, "no such file or folder: nowhere"),
        (["train", "RECIPE", "--hostfile", "none"], 2, "no such host file: none"),
        (["export", "nowhere", "out"], 2, "no such folder: nowhere"),
    ],
)
def test_faults(
    recipe: Path, arguments: list[str], code: int, message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    with pytest.raises(SystemExit) as ended:
        main([str(recipe) if argument == "RECIPE" else argument for argument in arguments])
    assert ended.value.code == code
    assert message in capsys.readouterr().err


def test_ranks_are_given_everything_but_how_they_are_started() -> None:
    told = ["train", "r.yaml", "--nproc", "2", "--set", "a=b", "--hostfile=hosts", "--json"]
    assert _without(told, ("--nproc", "--hostfile")) == ["train", "r.yaml", "--set", "a=b", "--json"]


@pytest.mark.parametrize("option", [["--nproc", "2"], ["--hostfile", "HOSTS"]])
def test_ranks_are_not_started_by_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: list[str]) -> None:
    from upcycle.cli.verbs import train
    from upcycle.errors import UsageError
    from upcycle.trainers.distributed import hosts, launcher

    started: list[Any] = []
    monkeypatch.setattr(launcher, "launch_ranks", lambda *a: started.append(a) or 0)
    monkeypatch.setattr(hosts, "launch_hosts", lambda *a: started.append(a) or 0)
    monkeypatch.setenv(launcher.COMMAND, "")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{model: m, output: o, data: demo, stages: {steps: 1, learning_rate: 1}}")
    arguments = [str(recipe), *option]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE=2 and RANK=1 say that this process is one of several") as error:
        train.command.main(arguments, standalone_mode=False)
    assert option[0] in error.value.message
    assert not started
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")  # as some clusters say of a lone process
    train.command.main(arguments, standalone_mode=False)
    assert len(started) == 1
