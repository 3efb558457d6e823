"""``upcycle compare MOE``: it takes what the source is, refuses the other kind's options, and saves what it found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from upcycle.cli.main import cli
from upcycle.cli.reference.json_page import JSON_KEYS
from upcycle.evaluation import compare as splits
from upcycle.evaluation.compressing import compare_compressions as cuts

Models = Callable[..., Path]
SMALL = ("--calibration-tokens", "256", "--window", "32", "--tokens", "64")


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)])


@pytest.mark.long
def test_a_moe_is_compressed_and_saved(pico_moe: Models, tmp_path: Path) -> None:
    moe, page, data = pico_moe("mixtral"), tmp_path / "page.md", tmp_path / "compare.json"
    words = (moe, "--compress", "frequency", "--keep", "0.5", *SMALL)
    made = run(*words, "--out", data, "--json")
    assert made.exit_code == 0, made.output
    printed = json.loads(made.stdout)
    assert json.loads(data.read_text()) == printed
    assert list(printed) == JSON_KEYS["compare of a MoE"].split()
    assert list(printed["results"][0]) == JSON_KEYS["compare of a MoE, results"].split()
    assert list(printed["timing"]) == JSON_KEYS["compare timing"].split()
    assert {row["method"] for row in printed["results"]} == {"frequency", "random_experts"}
    assert "of " in made.stderr
    assert "4 compressions" in " ".join(made.stderr.split())
    assert "will take about" in " ".join(made.stderr.split())
    again = run(*words, "--no-time", "-q", "--out", page)
    assert again.exit_code == 0, again.output
    assert page.read_text().startswith("| kept | method | refit |")
    assert "upcycle compress" in again.stdout
    assert "compressions of" not in again.stderr
    assert run(*words, "--no-time", "-q", "--out", page).exit_code == 0  # what upcycle wrote is replaced
    page.write_text("mine")
    refused = run(*words, "--no-time", "-q", "--out", page)
    assert refused.exit_code != 0
    assert page.read_text() == "mine"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(splits, "compare", never)
    monkeypatch.setattr(cuts, "compare_compressions", never)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--methods", "all"),
        ("--routers", "all"),
        ("--active", "0.5"),
        ("--pieces", "8"),
        ("--layers", "all"),
        ("--grid", "full"),
    ],
)
def test_options_of_splits_are_refused_of_a_moe(option: str, value: str, pico_moe: Models) -> None:
    made = run(pico_moe("mixtral"), option, value)
    error = made.exception
    assert f"is a Mixture-of-Experts, and {option} of a split" in getattr(error, "message", "")
    assert "--compress all --keep 0.75,0.5" in getattr(error, "hint", "")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("words", [("--compress", "all"), ("--keep", "0.75,0.5")])
def test_options_of_compressions_are_refused_of_a_dense_model(
    words: tuple[str, str], pico: Callable[[str], Path]
) -> None:
    error = run(pico("llama"), *words).exception
    assert f"is no Mixture-of-Experts that can be compressed, which {words[0]} asks for" in getattr(
        error, "message", ""
    )
    assert "--active 0.75,0.5" in getattr(error, "hint", "")


@pytest.mark.usefixtures("no_work")
def test_keep_takes_fractions(pico_moe: Models) -> None:
    error = run(pico_moe("mixtral"), "--keep", "half").exception
    assert "--keep takes fractions, got 'half'" in getattr(error, "message", "")


def test_each_kind_gets_its_own_options(
    pico: Callable[[str], Path], pico_moe: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[dict[str, Any]] = []

    def keep(source: str, **options: Any) -> None:
        got.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(splits, "compare", keep)
    monkeypatch.setattr(cuts, "compare_compressions", keep)
    run(pico("llama"), "--within", "1.1")
    run(pico_moe("mixtral"), "--within", "1.1", "--calibration-tokens", "64")
    dense, moe = got
    assert {"methods", "routers", "active", "pieces", "layers", "grid"} == set(dense) - set(moe)
    assert {"compress", "keep", "calibration_tokens"} == set(moe) - set(dense)
    assert (dense["within"], moe["within"], moe["keep"]) == (1.1, 1.1, [0.75, 0.5])
