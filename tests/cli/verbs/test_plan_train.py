"""The verb plan train beside plan."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("deepspeed")

from upcycle.cli.main import cli, main

RECIPE = "length: 32\nglobal_batch: 16\nstages: {steps: 4, learning_rate: 0.001}\n"


@pytest.fixture
def arguments(pico_moe: Callable[[str], Path], tmp_path: Path) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return ["plan", "train", str(path), "--model", str(pico_moe("mixtral"))]


def test_the_table_and_the_command_to_type_next(arguments: list[str]) -> None:
    shown = CliRunner().invoke(cli, [*arguments, "--world", "2x8xH100"])
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["estimate", "16", "x", "H100", "SXM,", "2", "machines;", "nothing", "was", "run"]
    assert sum("recommended" in line for line in lines) == 1
    assert sum("the recipe's" in line for line in lines) == 1
    assert any(line.startswith("next") and "upcycle train" in line for line in lines)
    told = json.loads(CliRunner().invoke(cli, [*arguments, "--world", "2x8xH100", "--json"]).stdout)
    words = shlex.split(told["command"])
    assert words[-2:] == ["--hostfile", "HOSTS"]
    context = cli.get_command(None, "train").make_context("train", words[2:])  # type: ignore[arg-type, union-attr]
    chosen = told["recommended"]
    assert context.params["set_"] == {"zero.stage": chosen["zero"], "expert_parallel": chosen["expert_parallel"]}


def test_json_and_ranks_on_this_machine(arguments: list[str]) -> None:
    shown = CliRunner().invoke(cli, [*arguments, "--world", "2", "--json", "--set", "expert_parallel=2"])
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert (told["kind"], told["ranks"], told["device"]["name"]) == ("estimate", 2, "cpu")
    assert told["own"]["expert_parallel"] == 2
    assert told["command"].endswith("--nproc 2")


def test_what_does_not_fit(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upcycle.trainers.forecast.plan_training.USABLE", 1e-9)
    shown = CliRunner().invoke(cli, [*arguments, "--world", "8xH100"])
    assert shown.exit_code == 0, shown.output
    assert "no row fits into the 80 GB of a device" in shown.stderr
    assert "activation_checkpointing: true" in shown.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--world", "8xH900"], "unknown device 'H900'"),
        (["--world", "3xH100"], "is not a multiple of micro_batch 1 x 3 ranks"),
        (["--set", "expert_parallel=16", "--world", "16xH100"], "is more than the 4 experts"),
        (["--dense-tokens", "1e12", "--world", "8xH100"], "does not say what it was converted from"),
        (["--dense-tokens", "0", "--world", "8xH100"], "dense-tokens"),
    ],
)
def test_faults(arguments: list[str], more: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *more])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_plans_of_conversions_go_on(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = CliRunner().invoke(cli, ["plan", str(pico("llama")), "--experts", "2", "--json"])
    assert json.loads(dense.stdout)["parameters_dense"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train").symlink_to(pico("llama"))
    # An option is no recipe: RECIPE is missing.
    assert CliRunner().invoke(cli, ["plan", "train", "--json"]).exit_code == 2
    assert json.loads(CliRunner().invoke(cli, ["plan", "./train", "--json"]).stdout)["parameters_dense"]
    assert json.loads(CliRunner().invoke(cli, ["plan", "--json", "train"]).stdout)["parameters_dense"]


def test_help_of_both() -> None:
    assert "upcycle plan train RECIPE" in CliRunner().invoke(cli, ["plan", "--help"]).output
    own = CliRunner().invoke(cli, ["plan", "train", "--help"]).output
    assert "--world" in own
    assert "plan train [OPTIONS] RECIPE" in own
