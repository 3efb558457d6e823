"""The card and the report of a compressed MoE: what they call it, and what they say is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import upcycle
from upcycle.report.collect import Wanted


@pytest.fixture
def compressed(pico_moe: Callable[..., Path], tmp_path: Path) -> Path:
    source, seen = str(pico_moe("mixtral")), tmp_path / "private-place" / "seen.safetensors"
    seen.parent.mkdir()
    upcycle.observe(source, seen, "demo", 512)
    keys = {"keep": 0.5, "observations": str(seen), "calibration": {"text": "demo", "tokens": 512, "window": 32}}
    upcycle.convert(source, tmp_path / "out", method="hc_smoe", verification={"tokens": 64}, **keys)
    return tmp_path / "out"


def test_the_card_says_what_it_is_and_no_folder(compressed: Path) -> None:
    upcycle.write_card(compressed)
    card = (compressed / "README.md").read_text()
    assert "A smaller Mixture-of-Experts model made from" in card
    assert "2 experts from 4, top-2" in card
    assert "compression.json" in card
    assert "not the same function as its source" in card
    assert "worse text than the model that it was made from" in card
    for wrong in ("larger", "dense model", "starting point for training", "private-place"):
        assert wrong not in card, wrong


@pytest.mark.long
def test_the_report_lists_the_experts_that_are_left(compressed: Path) -> None:
    report = upcycle.write_report(compressed, wanted=Wanted(["prose"], 64, ["def"]))
    decided = json.loads((compressed / "compression.json").read_text())
    for layer in report.data["made"]["cuts"]:
        cut, refit = decided["experts"][str(layer["layer"])], decided["refit"][str(layer["layer"])]
        assert layer["experts"] == [[term["expert"] for term in terms] for terms in cut["experts"]]
        assert {key: layer[key] for key in refit} == refit
    page = report.html.read_text()
    assert report.data["quality"]["names"] == ["before", "after"]
    assert "Experts that are left" in page
    first = report.data["made"]["cuts"][0]
    assert f"<td>{', '.join('+'.join(map(str, terms)) for terms in first['experts'])}</td>" in page
    assert f"{first['missing_before']:.1%} missing, then {first['missing_after']:.1%}" in page
    assert "private-place" not in page


@pytest.fixture
def dense(pico_moe: Callable[..., Path], tmp_path: Path) -> Path:
    keys = {"width": 40, "calibration": {"text": "demo", "tokens": 512, "window": 32}}
    upcycle.convert(str(pico_moe("dots1")), tmp_path / "out", method="to_dense", verification={"tokens": 64}, **keys)
    return tmp_path / "out"


@pytest.mark.long
def test_the_card_of_a_dense_model_says_what_it_was_made_of(dense: Path) -> None:
    upcycle.write_card(dense)
    card = (dense / "README.md").read_text()
    assert "A dense model made from" in card
    assert "qwen3, FFNs of 40 neurons from 4 experts of 16 and 16 shared neurons" in card
    assert "compression.json" in card
    assert "Qwen3ForCausalLM" in card
    for wrong in ("A smaller Mixture-of-Experts", "larger", "starting point for training", "- moe"):
        assert wrong not in card, wrong


@pytest.mark.long
def test_the_report_of_a_dense_model_says_how_many_neurons_are_left(dense: Path) -> None:
    report = upcycle.write_report(dense, wanted=Wanted(["prose"], 64, ["def"]))
    decided = json.loads((dense / "compression.json").read_text())
    for layer in report.data["made"]["cuts"]:
        parts = decided["experts"][str(layer["layer"])]["parts"]
        assert layer["neurons"] == [len(part["terms"][0]["order"]) for part in parts]
        assert sum(layer["neurons"]) == 40
        assert layer["experts"][-1] == ["shared"]
    first = report.data["made"]["cuts"][0]
    shown = ", ".join(f"{own[0]} ({count})" for own, count in zip(first["experts"], first["neurons"], strict=True))
    assert f"<td>{shown}</td>" in report.html.read_text()
    assert report.data["quality"]["names"] == ["before", "after"]
