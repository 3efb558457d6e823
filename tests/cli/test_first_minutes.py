"""What somebody sees who types a command for the first time, or types it wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from upcycle.cli.main import VERB_GROUPS, VERBS, cli, main
from upcycle.cli.shared import output
from upcycle.cli.shared.grouped_help import OPTION_GROUPS
from upcycle.cli.shared.output import print_json
from upcycle.errors import UsageError
from upcycle.recipe.conversion_recipe import parse_recipe
from upcycle.recipe.shipped_recipes import RECIPE_VERBS, shipped


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def completions(*words: str) -> list[str]:
    """What bash is given for the last of the words behind ``upcycle``."""
    asked = {"COMP_WORDS": " ".join(["upcycle", *words]), "COMP_CWORD": str(len(words))}
    environment = {**os.environ, **asked, "_UPCYCLE_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "upcycle"], env=environment, capture_output=True, text=True, check=True
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line.startswith("plain,")]


@pytest.mark.parametrize("columns", [60, 100])
def test_no_line_of_the_first_help_is_wider_than_the_terminal(columns: int) -> None:
    out = CliRunner().invoke(cli, ["--help"], terminal_width=columns).output
    assert max(map(len, out.splitlines())) <= columns
    assert ("--experts 8\n      see what" in out) == (columns == 60)


def test_upcycle_alone_prints_all_verbs_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ended(capsys)
    assert (code, err) == (0, "")
    for title, verbs in VERB_GROUPS.items():
        section = out.partition(f"{title}:\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines() if line[2] != " "] == list(verbs)
    assert "..." not in out.partition("Options")[2]  # nothing is cut off


def test_python_m_upcycle_is_upcycle() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "upcycle", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("upcycle, version ")


@pytest.mark.parametrize("verb", ["convert", "plan", "compress"])
def test_many_options_are_printed_in_groups_each_once(verb: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    out = CliRunner().invoke(cli, [verb, "--help"]).stdout
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            name = parameter.opts[-1]
            assert len([line for line in out.splitlines() if re.match(rf"  (-\w, )?{name}(,| |$)", line)]) == 1, name
    titles = [line.removesuffix(":") for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [
        title for title in OPTION_GROUPS if title in titles
    ]  # none is left over for a last, nameless group


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("conver", "demo"), "no such command: conver", "did you mean 'convert'?"),
        (("convert", "--metod", "x"), "no such option: --metod", "did you mean --method"),
        (("convert",), "missing argument 'SOURCE'", "upcycle convert --help"),
        (("plan", "demo", "--experts", "many"), "'many' is not a valid integer", "upcycle plan --help"),
        (("recipe", "splt_50"), "no such recipe: splt_50", "did you mean 'split_50'?"),
        (("recipe", "nothing-alike"), "no such recipe: nothing-alike", "upcycle list recipes names them all\n"),
        (("recipe", "cumo"), "there are 2 recipes 'cumo', for convert and train", "upcycle recipe cumo --for train"),
        (
            ("convert", "demo", "out", "--method", "randomsplit"),
            "unknown method 'randomsplit'",
            "did you mean 'random_split'?",
        ),
    ],
)
def test_what_is_typed_wrong_is_said_and_what_was_meant(
    arguments: tuple[str, ...], message: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ended(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert f"\nhint: {hint}" in err or hint in err.partition("hint: ")[2]
    code, out, err = ended(capsys, *arguments, "--json")
    told = json.loads(out)["error"]
    assert set(told) == {"message", "hint", "exit_code"}
    assert (told["exit_code"], code) == (2, 2)
    assert message in told["message"]
    assert message in err


def test_a_result_that_was_printed_stays_the_only_document(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def printed(*_: Any, **__: Any) -> None:
        print_json({"verdict": "broken"})
        raise UsageError("something behind it")

    monkeypatch.setattr(click.Command, "invoke", printed)
    code, out, err = ended(capsys, "env", "--json")
    assert code == 2
    assert json.loads(out) == {"verdict": "broken"}
    assert "something behind it" in err


def test_every_recipe_is_printed_as_it_is_and_can_be_used(tmp_path: Path) -> None:
    for verb in RECIPE_VERBS:
        for name, path in shipped(verb).items():
            result = CliRunner().invoke(cli, ["recipe", name, "--for", verb])
            assert result.stdout == path.read_text(encoding="utf-8").rstrip("\n") + "\n"
    printed = CliRunner().invoke(cli, ["recipe", "split_50"]).stdout
    assert parse_recipe({"source": "demo", **yaml.safe_load(printed)}, "recipe").active == 0.5


def test_the_shell_completes_verbs_recipes_and_names() -> None:
    assert completions("comp") == ["compare", "compress", "completion"]
    assert completions("convert", "split_") == ["split_25", "split_50", "split_75"]
    assert completions("train", "heal") == ["heal_distill", "heal_split"]
    assert completions("convert", "demo", "out", "--router", "rid") == ["ridge"]
    assert "naee" in completions("compress", "moe", "out", "--method", "n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_call_upcycle(shell: str) -> None:
    script = CliRunner().invoke(cli, ["completion", shell]).stdout
    assert "_UPCYCLE_COMPLETE=" + shell in script


def test_every_verb_is_in_one_group() -> None:
    assert sum(len(verbs) for verbs in VERB_GROUPS.values()) == len(VERBS)


def test_a_log_has_a_line_of_progress_every_half_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    clock = chain([0.0, 12.0, 31.0, 40.0, 62.0, 70.0], repeat(80.0))
    monkeypatch.setattr(output, "monotonic", lambda: next(clock))
    bars = output.ProgressBars(quiet=False)
    with bars.phase("refitting [layers]", 6):
        for _ in range(6):
            bars.advance()
    assert capsys.readouterr().err.splitlines() == [
        "refitting [layers]: 2 of 6, about 1 min 02 s left",
        "refitting [layers]: 4 of 6, about 31.0 s left",
    ]
    clock = chain([0.0], repeat(31.0))
    quiet = output.ProgressBars(quiet=True)
    with quiet.phase("refitting", 2):
        quiet.advance()
    assert capsys.readouterr().err == ""


def test_one_of_a_kind_is_shown_with_its_parameters_and_paper(capsys: pytest.CaptureFixture[str]) -> None:
    everything = CliRunner().invoke(cli, ["list", "losses"]).stdout
    assert "ReMoE's regularisation" in everything
    assert "lambda_0" not in everything
    one = CliRunner().invoke(cli, ["list", "losses", "relu_l1"]).stdout
    assert "https://arxiv.org/abs/2412.14711" in one
    assert "lambda_0" in one
    assert json.loads(CliRunner().invoke(cli, ["list", "losses", "relu_l1", "--json"]).stdout)["name"] == "relu_l1"
    code, _, err = ended(capsys, "list", "losses", "relul1")
    assert code == 2
    assert "no such loss: relul1" in err
    assert "did you mean 'relu_l1'?" in err
