"""``upcycle push`` and ``upcycle card`` as commands: what they print, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from upcycle.cli.main import cli, main


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments))


@pytest.mark.long
def test_the_url_comes_last(hub: Any, out: Path) -> None:
    dry = run("push", str(out), "alice/moe", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "nothing was sent to alice/moe (public)" in dry.stdout
    assert "model-00001-of-" in dry.stdout
    assert not hub.repos
    done = run("push", str(out), "alice/moe", "--private", "--collection", "My experts")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == f"{hub.url}/alice/moe"
    assert "alice/moe (private)" in done.stdout
    assert "no keys and no folders of this machine in 13 files" in done.stdout
    again = run("push", str(out), "alice/moe", "-q")
    assert "nothing: the repository has all files already" in again.stdout
    assert again.stderr == ""


@pytest.mark.long
def test_json(hub: Any, out: Path) -> None:
    result = json.loads(run("push", str(out), "alice/moe", "--json").stdout)
    assert result["commit"] == hub.repos["alice/moe"].refs["main"]
    assert {file["name"] for file in result["files"]} == {path.name for path in out.iterdir()} - {".upcycle-local.json"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["push", "OUT", "moe"], 2, "'moe' has no owner"),
        (["push", "OUT"], 2, "missing argument 'REPO'"),
        (["push", "OUT", "bob/moe"], 4, "you may not write to bob/moe"),
        (["push", "OUT/none", "alice/moe"], 2, "no such folder"),
        (["push", ".", "alice/moe"], 1, "has no upcycle.json"),
        (["card", "OUT", "--base-model", "dense"], 2, "--base-model takes a hub id, got 'dense'"),
    ],
)
def test_exit_codes(
    hub: Any, out: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([argument.replace("OUT", str(out)) for argument in arguments])
    assert stop.value.code == code
    assert words in " ".join(capsys.readouterr().err.split())


def test_card_names_the_file_and_the_next_command(out: Path) -> None:
    result = run("card", str(out), "--name", "you/moe", "--license", "mit")
    assert result.exit_code == 0, result.output
    assert str(out / "README.md") in result.stdout
    assert f"upcycle push {out} YOU/moe --dry-run" in result.stdout
    assert "\n# you/moe\n" in (out / "README.md").read_text()
