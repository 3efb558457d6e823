"""The page is valid, whole in itself, small and safe; what cannot be known is said."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from report_parts import HOSTILE, write_log
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.cli.main import cli
from upcycle.errors import CheckpointError, EnvironmentFault, UpcycleError, UsageError
from upcycle.report.collect import SECTIONS, Wanted, collect
from upcycle.report.write_report import Report, write_report

Pico = Callable[[str], Path]
VOID = {"meta", "link", "img"}
FAST = Wanted(["code"], 64, ["def"])


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects what asks for something."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.addresses: list[tuple[str, str, str]] = []
        self.plots: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert len(values) == len(attrs), f"{tag} repeats an attribute"
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.addresses += [
            (tag, key, value or "") for key, value in attrs if key in ("src", "href", "srcset", "action")
        ]
        assert not any(key.startswith("on") for key in values), f"{tag} has a handler"
        if values.get("role") == "img":
            self.plots.append(values)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(report: Report) -> tuple[str, Page]:
    text, page = report.html.read_text(encoding="utf-8"), Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return text, page


def test_the_page_is_valid_and_needs_nothing_else(full_report: Report) -> None:
    text, page = read(full_report)
    assert len(set(page.ids)) == len(page.ids)
    assert set(SECTIONS) <= set(page.ids)
    for tag, key, value in page.addresses:
        links = tag == "a" and key == "href" and value.startswith(("https://", "#"))
        assert links or value.startswith("data:"), (tag, key, value)
        if value.startswith("#"):
            assert value[1:] in page.ids
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert full_report.html.stat().st_size < 3_000_000
    assert not any("missing" in full_report.data[section] for section in SECTIONS)


def test_every_plot_has_words(full_report: Report) -> None:
    text, page = read(full_report)
    assert len(page.plots) > 20
    labels = [plot["aria-label"] or "" for plot in page.plots]
    assert len(set(labels)) == len(labels)
    assert all(len(label) > 40 for label in labels)
    assert text.count("<figure") == text.count("<figcaption><strong>") == len(page.plots)
    assert text.count('class="xlabel"></div>') == text.count('class="ylabel"></div>') == 0


def test_names_from_outside_are_text(full_report: Report) -> None:
    text, page = read(full_report)
    assert "<b>bold" not in text
    assert "<b>" not in "".join(re.findall(r'class="values">(.*?)</script>', text))
    # As prompt, training stage and alarm, compared source and method.
    assert page.text.count(HOSTILE) >= 5


def test_the_json_is_what_the_page_was_drawn_from(full_report: Report) -> None:
    stored = json.loads(full_report.json.read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(full_report.data))
    verified = json.loads((full_report.html.parent / "model" / "verification.json").read_text())
    assert stored["exactness"]["verification"] == verified
    record = json.loads((full_report.html.parent / "model" / "upcycle.json").read_text())
    assert stored["cost"]["after"]["parameters"] == record["plan"]["parameters_total"]
    kinds = [(layer["kind"], layer["shared"], layer["routed"], layer["top_k"]) for layer in stored["made"]["layers"]]
    assert kinds == [("dense", 0, 0, 0), ("moe", 2, 6, 3), ("moe", 2, 6, 3)]
    assert [layer["neurons"] for layer in stored["made"]["layers"]] == [96, 12, 12]
    assert stored["made"]["layers"][1]["shared_neurons"] == 24


def test_training_curves(full_report: Report) -> None:
    training = full_report.data["training"]
    assert (training["steps"], training["tokens"], training["skipped_steps"]) == (1000, 64_000, 1)
    loss = training["curves"]["loss"]
    assert len(loss["steps"]) <= 400
    # Stretches of three steps, their mean at the last.
    assert loss["steps"][:2] == [3, 6]
    assert loss["values"][0] == pytest.approx(3 + (1 + 1 / 2 + 1 / 3) / 3)
    assert set(training["curves"]["max_violation"]["values"]) == {0.5}
    assert set(training["curves"]["dead_experts"]["values"]) == {2.0}
    assert training["validation"]["prose"]["steps"] == list(range(100, 1001, 100))
    assert training["alarms"] == [{"step": 1000, "message": HOSTILE}]
    assert any("1 alarm" in finding["text"] for finding in full_report.data["summary"]["findings"])


def convert(pico: Pico, out: Path, **keys: Any) -> Path:
    settings = {"experts": 4, "top_k": 2, "verification": {"tokens": 64}} | keys
    upcycle.convert(str(pico("llama")), out, **settings)
    return out


def texts(data: dict[str, Any]) -> str:
    return "\n".join(f"{finding['level']} {finding['text']}" for finding in data["summary"]["findings"])


@pytest.mark.long
def test_an_exact_conversion_is_said_to_be_one(pico: Pico, tmp_path: Path) -> None:
    report = write_report(convert(pico, tmp_path / "out"), wanted=FAST)
    assert report.html == tmp_path / "out" / "report.html"
    assert report.data["summary"]["verdict"] == "exact"
    assert "good perplexity is 1.000x" in texts(report.data)
    assert [sample["same"] for sample in report.data["quality"]["samples"]] == [True]
    read(report)
    upcycle.verify(tmp_path / "out", tokens=64)  # a report beside the model does not disturb it


def test_a_file_that_changed_is_told(pico: Pico, tmp_path: Path) -> None:
    out = convert(pico, tmp_path / "out")
    (out / "recipe.yaml").write_text((out / "recipe.yaml").read_text() + "# mine\n")
    precious = tmp_path / "bashrc"
    precious.write_text("precious")
    for name in ("report.html", "report.json", "report.html.tmp"):  # in a folder of somebody else's
        (out / name).symlink_to(precious)
    data = write_report(out, wanted=Wanted(run=False)).data
    assert "bad files have changed" in texts(data)
    assert data["quality"]["missing"] == "the model was not run (--no-run)"
    assert precious.read_text() == "precious"


@pytest.mark.long
def test_weights_that_are_not_finite_are_told(pico: Pico, tmp_path: Path) -> None:
    out = convert(pico, tmp_path / "out")
    path = out / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "experts.0" in name or name.endswith("gate.weight"):
            tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, path, metadata={"format": "pt"})
    report = write_report(out, wanted=FAST)
    assert "bad the model's output is not finite on code: do not use it" in texts(report.data)
    assert report.data["cost"]["after"]["bytes"] == path.stat().st_size  # a blueprint is no weights
    read(report)


def test_text_that_it_was_calibrated_on_is_no_headline() -> None:
    from upcycle.report.data.summary import _say_quality
    from upcycle.text.held_out import flattered

    found: list[tuple[str, str]] = []
    for share in (0.9, 0.0):
        quality = {"ratio": 1.0, "domains": [{"text": "a", "perplexity": 2.0}], "remarks": {"a": flattered(share)}}
        _say_quality(quality, lambda *finding: found.append(finding))
    assert [level for level, _ in found] == ["caution", "good"]
    assert ["calibrated on" in text for _, text in found] == [True, False]


@pytest.mark.long
@pytest.mark.parametrize(("cosine", "told"), [(0.93, True), (0.85, False)])
def test_router_rows_that_are_nearly_the_same_are_a_finding(
    pico: Pico, tmp_path: Path, cosine: float, told: bool
) -> None:
    out = convert(pico, tmp_path / "out")
    path = out / "model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if "layers.1." in name and name.endswith("gate.weight"))
    rows = torch.eye(*tensors[name].shape, dtype=torch.float32)
    rows[2] = cosine * rows[0] + (1 - cosine**2) ** 0.5 * rows[2]
    tensors[name] = rows.to(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    data = write_report(out, wanted=FAST).data
    found = [text for text in texts(data).splitlines() if "router rows are nearly the same" in text]
    assert bool(found) == told
    if told:
        assert "in 1 of 3 layers (cosine 0.93 of experts 0 and 2 in layer 1)" in found[0]


def test_a_model_from_elsewhere(pico_moe: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pico_moe("dots1"), tmp_path / "dots"))
    report = write_report(folder, tmp_path / "r.html", FAST)
    data = report.data
    assert data["summary"]["verdict"] == "unverified"
    assert "how it was made is not known" in data["made"]["note"]
    assert all("missing" in data[name] for name in ("exactness", "provenance", "training", "comparison"))
    assert [(layer["routed"], layer["top_k"], layer["shared_neurons"]) for layer in data["made"]["layers"]] == [
        (4, 2, 16)
    ] * 2
    assert len(data["routing"]["layers"]) == 2
    assert "--source" in data["quality"]["no_reference"]
    assert data["experts"]["layers"][0]["to_dense"] is None
    read(report)


def test_a_moe_that_is_no_target_and_a_dense_model(pico: Pico, pico_moe: Callable[..., Path], tmp_path: Path) -> None:
    for folder, watched in ((pico_moe("olmoe"), True), (pico("llama"), False)):
        report = write_report(folder, tmp_path / "r.html", FAST)
        routing = report.data["routing"]
        assert routing.get("layers") if watched else "no layer has a router" in routing["missing"]
        assert report.data["quality"]["domains"][0]["perplexity"] > 1
        summary = report.data["summary"]
        assert summary["verdict"] == ("unverified" if watched else "dense")
        assert ("not written by upcycle" in texts(report.data)) == watched
        assert len(summary["answers"]) == (3 if watched else 2)  # no dense model is faster than itself
        read(report)


@pytest.mark.long
def test_a_growth_step(pico: Pico, tmp_path: Path) -> None:
    out = tmp_path / "deep"
    upcycle.convert(str(pico("llama")), out, method="depth_stack", verification={"tokens": 64})
    report = write_report(out, wanted=FAST)
    assert list(report.data["quality"]["names"]) == ["before", "after"]
    assert {layer["kind"] for layer in report.data["made"]["layers"]} == {"dense"}
    read(report)


@pytest.mark.long
def test_the_parent_has_moved(pico: Pico, dense: Path, tmp_path: Path) -> None:
    upcycle.convert(str(dense), tmp_path / "out", experts=4, top_k=2, verification={"enabled": False})
    moved = dense.rename(tmp_path / "moved")
    report = write_report(tmp_path / "out", wanted=FAST)
    assert "--source" in report.data["quality"]["no_reference"]
    assert report.data["quality"]["ratio"] is None
    assert "caution not verified" in texts(report.data)
    assert report.data["experts"]["layers"][0]["to_dense"] is None
    read(report)
    wanted = Wanted(["code"], 64, ["def"], source=str(moved))
    assert collect(str(tmp_path / "out"), wanted)[1]["quality"]["ratio"] == pytest.approx(1, abs=1e-4)


def test_an_unfinished_conversion(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    (partial / "layer_blueprints").mkdir(parents=True)
    (partial / "layer_blueprints" / "00000.safetensors").write_bytes(b"")
    (partial / "journal.jsonl").write_text('{"unit": "a"}\n{"unit": "b"}\n')
    report = write_report(tmp_path / "out", tmp_path / "r.html")
    assert report.data["summary"]["verdict"] == "unfinished"
    assert "1 layers are decided and 2 units are written; to continue it, run the same command again" in texts(
        report.data
    )
    read(report)


def test_a_training_run_that_exported_nothing_yet(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", 3)
    report = write_report(tmp_path)
    assert report.data["training"]["steps"] == 3
    assert report.data["summary"]["verdict"] == "unfinished"
    read(report)


def test_damaged_weights_leave_the_rest(pico: Pico, tmp_path: Path) -> None:
    out = convert(pico, tmp_path / "out")
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    report = write_report(out, wanted=FAST)
    assert "bad files have changed" in texts(report.data)
    assert "model.safetensors" in report.data["quality"]["missing"]
    assert report.data["provenance"]["source"]["name"] == pico("llama").name
    read(report)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"name": "nothing/here/at/all"}, UsageError, "no such file or folder"),
        ({"name": "{empty}"}, UsageError, "holds no config.json"),
        ({"name": "{out}", "out": "{empty}/r.txt"}, UsageError, r"--out|cannot write a report"),
        ({"name": "{out}", "out": "{empty}/no/r.html"}, UsageError, "cannot write a report"),
        ({"name": "{out}", "wanted": Wanted(["poetry"])}, UsageError, "no such text file"),
        ({"name": "{out}", "wanted": Wanted(compare=Path("gone.json"), run=False)}, CheckpointError, "no such file"),
        ({"name": "{out}", "wanted": Wanted(training=Path("gone"), run=False)}, UsageError, "no training log"),
    ],
)
def test_bad_input(
    arguments: dict[str, Any], kind: type[UpcycleError], words: str, full_report: Report, tmp_path: Path
) -> None:
    places = {"empty": tmp_path, "out": full_report.html.parent / "model"}
    filled = {key: value.format(**places) if isinstance(value, str) else value for key, value in arguments.items()}
    with pytest.raises(kind, match=words) as error:
        write_report(**filled)
    assert error.value.hint
    assert not list(tmp_path.iterdir())


def test_a_comparison_that_is_none(full_report: Report, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a comparison"):
        write_report(
            full_report.html.parent / "model", tmp_path / "r.html", Wanted(compare=tmp_path / "c.json", run=False)
        )


def test_without_the_extra(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upcycle.report.write_report.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="jinja2") as error:
        write_report(pico("llama"), tmp_path / "r.html")
    assert error.value.hint == "pip install 'upcycle[report]'"


def test_the_command(full_report: Report, tmp_path: Path) -> None:
    model = str(full_report.html.parent / "model")
    result = CliRunner().invoke(cli, ["report", model, "--out", str(tmp_path / "r.html"), "--no-run", "-q"])
    assert result.exit_code == 0, result.output
    said = re.sub(r"\s+", " ", result.stdout)
    assert "verdict approximate" in said
    assert "left out quality: the model was not run (--no-run)" in said
    assert f"{tmp_path / 'r.html'}" in said.replace(" ", "")
    result = CliRunner().invoke(cli, ["report", model, "--out", str(tmp_path / "r.html"), "--no-run", "-q", "--json"])
    assert json.loads(result.stdout) == json.loads((tmp_path / "r.json").read_text())
