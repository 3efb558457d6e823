"""What a report says first, what its script is given, and several models side by side."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import upcycle
from upcycle.cli.main import cli
from upcycle.errors import UsageError
from upcycle.report.collect import Wanted
from upcycle.report.data.answers import answers
from upcycle.report.data.subject import Subject
from upcycle.report.write_report import Report, write_report, write_side_by_side

Pico = Callable[[str], Path]
FAST = Wanted(["code"], 64, ["def"])


def convert(pico: Pico, out: Path, **keys: Any) -> Path:
    upcycle.convert(str(pico("llama")), out, **{"experts": 4, "top_k": 2, "verification": {"tokens": 64}} | keys)
    return out


def test_the_page_runs_its_own_script_and_no_other(full_report: Report) -> None:
    text = full_report.html.read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in text
    assert text.count("<script") == 1 + text.count('<script type="application/json" class="values">')
    for word in (
        "fetch(",
        "XMLHttpRequest",
        "import(",
        "eval(",
        "innerHTML",
        "document.write",
        "localStorage",
        "cookie",
    ):
        assert word not in script


def test_figures_carry_the_numbers_that_they_show(full_report: Report) -> None:
    text = full_report.html.read_text(encoding="utf-8")
    blocks = [json.loads(block) for block in re.findall(r'class="values">(.*?)</script>', text)]
    assert {block["kind"] for block in blocks} == {"grid", "lines", "bars"}
    (loads,) = [block for block in blocks if block["kind"] == "grid" and block["rows"] == "layer"]
    layers = full_report.data["routing"]["layers"]
    assert loads["names"][0] == [str(layer["layer"]) for layer in layers]
    for cells, layer in zip(loads["cells"], layers, strict=True):
        assert cells == pytest.approx(layer["load"], rel=1e-3)
    rows = re.findall(r'<tr><th scope="row">(\d+)</th><td>(\d+)</td><td class="number">([\d.]+)x</td>', text)
    assert [(int(layer), int(expert), float(load)) for layer, expert, load in rows] == [
        (layer["layer"], expert, round(load, 2)) for layer in layers for expert, load in enumerate(layer["load"])
    ]


def test_the_first_questions_are_answered(pico: Pico, tmp_path: Path) -> None:
    def answered(**keys: Any) -> dict[str, tuple[str, str]]:
        data = write_report(convert(pico, tmp_path / f"out{len(keys)}", **keys), wanted=FAST).data
        return {each["question"]: (each["text"], each["command"]) for each in data["summary"]["answers"]}

    copies = answered()
    assert copies["May I use it?"][0].startswith("Yes, wherever its dense parent is used")
    assert copies["Is it faster?"] == (
        "Not known: speed was not measured.",
        "upcycle evaluate out0 --reference PARENT --speed",  # names, as folders of this machine are not published
    )
    assert copies["What next?"][1].startswith("upcycle train upcycle_cpt --model")
    split = answered(method="random_split")
    assert split["May I use it?"][0].startswith(("With care", "Not as it is", "Yes: on the text"))
    assert split["Is it faster?"][0].startswith(("Predicted, relative to its parent", "Not known"))
    assert split["What next?"][1].startswith("upcycle train heal_distill --model")


@pytest.mark.long
def test_models_side_by_side_read_the_same_text(pico: Pico, tmp_path: Path) -> None:
    keys = {"method": "random_split", "calibration": {"text": "code", "tokens": 512, "window": 64}}
    split, copies = convert(pico, tmp_path / "half", **keys), convert(pico, tmp_path / "more")
    out = tmp_path / "models.html"
    done = CliRunner().invoke(
        cli, ["report", str(copies), str(split), "--out", str(out), "--text", "code", "--tokens", "64", "-q"]
    )
    assert done.exit_code == 0, done.output
    first, second = json.loads(out.with_suffix(".json").read_text())["models"]
    assert [first["out"], second["out"]] == ["more", "half"]  # without folders of this machine
    held_out = "the quarter that was held out of the calibration"
    assert first["quality"]["remarks"]["code"] == second["quality"]["remarks"]["code"] == held_out
    assert first["quality"]["domains"][0]["perplexity_dense"] == second["quality"]["domains"][0]["perplexity_dense"]
    text = out.read_text()
    assert text.count('<p class="verdict') == 2
    assert "Which loses least for its FLOPs?" in text
    for names, message in (([copies], "1 models side by side"), ([copies, copies], "2 models side by side")):
        with pytest.raises(UsageError, match=message):
            write_side_by_side([str(name) for name in names], out)
    precious = tmp_path / "mine.html"
    precious.write_text("mine")
    with pytest.raises(UsageError, match="upcycle did not write it"):
        write_side_by_side([str(copies), str(split)], precious)
    assert precious.read_text() == "mine"


def test_only_one_model_has_a_parent_a_comparison_and_a_run(tmp_path: Path) -> None:
    for option in ("--source", "--compare", "--training", "--images"):
        done = CliRunner().invoke(cli, ["report", "one", "other", option, "x", "--out", str(tmp_path / "page.html")])
        assert isinstance(done.exception, UsageError)
        assert "are of one model" in str(done.exception)


def test_the_next_command_can_be_typed_where_the_page_hides_folders(pico: Pico, tmp_path: Path) -> None:
    out = convert(pico, tmp_path / "half", method="random_split")
    done = CliRunner().invoke(cli, ["report", str(out), "--no-run"], catch_exceptions=False)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("next")]
    assert f"--model {out} --output" in line
    assert str(tmp_path) not in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("verdict", "kind", "ratio", "remark", "trained", "use", "command"),
    [
        ("exact", "copies", 1.0, "", False, "Yes, wherever", "upcycle train upcycle_cpt --model m"),
        ("exact", "compression", 1.0, "", False, "Yes, wherever", "upcycle evaluate m"),
        ("approximate", "partition", 1.01, "", False, "Yes: on the text", "upcycle train heal_distill --model m"),
        (
            "approximate",
            "partition",
            1.01,
            "calibrated on",
            False,
            "With care: on text that it was partly",
            "upcycle train heal",
        ),
        ("approximate", "partition", 1.05, "", False, "With care: on the text", "upcycle train heal_distill"),
        (
            "approximate",
            "partition",
            1.2,
            "",
            False,
            "Not as it is, but trained: on the text",
            "upcycle train heal_distill",
        ),
        ("approximate", "copies", 0.9, "", True, "Yes: on the text", "upcycle push m YOU/NAME --dry-run"),
        ("unverified", "copies", None, "", True, "Not known", "upcycle verify m"),
        ("broken", "copies", 3.0, "", False, "No: it must not be", "upcycle env"),
        ("unfinished", "copies", None, "", False, "Not yet", ""),
    ],
)
def test_every_state_has_its_answer(
    verdict: str, kind: str, ratio: float | None, remark: str, trained: bool, use: str, command: str
) -> None:
    subject = Subject("m", Path("m"), "finished", {"plan": {"kind": kind}}, {})
    sections = {
        "quality": {"ratio": ratio, "remarks": {"a": remark} if remark else {}},
        "exactness": {},
        "speed": {"missing": "not measured"},
        "provenance": {"trained": {"step": 1}} if trained else {},
    }
    problems = ["it must not be"] if verdict == "broken" else []
    first, _, last = answers(subject, verdict, problems, sections)
    assert first["text"].startswith(use)
    assert last["command"].startswith(command)
    assert bool(last["command"]) == bool(command)


def test_a_model_with_a_problem_is_not_to_be_used_whatever_its_verdict(pico: Pico, tmp_path: Path) -> None:
    out = convert(pico, tmp_path / "more")
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    other = convert(pico, tmp_path / "whole")
    data = write_report(out, wanted=Wanted(run=False)).data["summary"]
    assert data["verdict"] == "exact"  # when it was written
    assert data["answers"][0]["text"].startswith("No: files have changed since they were written")
    assert data["answers"][2]["command"] == "upcycle verify more"
    page = tmp_path / "page.html"
    done = CliRunner().invoke(
        cli, ["report", str(other), str(out), "--no-run", "--out", str(page)], catch_exceptions=False
    )
    assert "No: files have changed" in done.stdout
    assert "No: files have changed" in page.read_text()
