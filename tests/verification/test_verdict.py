"""Verdicts of models that add nothing, say nothing, or say it too loudly: numbers as they are, and JSON that is JSON."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.errors import VerificationError
from upcycle.ffn.blueprint import BlueprintFile, blueprint_recipe
from upcycle.files.locate import DEMO_FOLDER
from upcycle.verification.verdict import Totals, json_numbers, perplexity_of, relative, said, span

Pico = Callable[[str], Path]


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def strict(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    content: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return content


def silence(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("keys", [{"method": "random_split", "top_k": 4}, {"experts": 2}], ids=["split", "copies"])
def test_a_layer_that_adds_nothing_is_converted_without_an_error(
    keys: dict[str, Any], pico: Pico, tmp_path: Path
) -> None:
    source = changed(pico("llama"), tmp_path / "dense", silence)
    result = upcycle.convert(str(source), tmp_path / "out", verification={"tokens": 32}, **keys).verification
    assert result is not None
    assert result.verdict == ("approximate" if "method" in keys else "exact")
    assert "the dense FFN of layer 1 adds nothing" in result.explanation
    assert result.layer_errors[1] == 0
    assert strict(tmp_path / "out" / "verification.json")["layer_errors"][1] == 0


def test_output_of_a_layer_that_added_nothing_is_broken(pico: Pico, tmp_path: Path) -> None:
    """A relative error against zero is infinite: the verdict cannot be anything but broken."""
    source = changed(pico("llama"), tmp_path / "dense", silence)
    keys = {"method": "random_split", "top_k": 4, "verification": {"enabled": False}}
    upcycle.convert(str(source), tmp_path / "out", **keys)
    name = "model.layers.1.block_sparse_moe.experts.0.w2.weight"
    changed(tmp_path / "out", tmp_path / "wrong", lambda tensors: tensors[name].fill_(0.1))
    from upcycle.files import hashing, records

    record = records.read_record(tmp_path / "wrong")
    record["files"] = {file: hashing.hash_file(tmp_path / "wrong" / file) for file in record["files"]}
    (tmp_path / "wrong" / records.FILE).write_text(json.dumps(record))
    result = upcycle.verify(tmp_path / "wrong", tokens=32)
    assert result.verdict == "broken"
    assert "not finite" in result.explanation
    content = strict(tmp_path / "wrong" / "verification.json")
    assert content["layer_errors"][1] is None
    assert content["layer_errors"][0] > 0


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("factor", "loss"), [(0.0, math.log(4096)), (1e5, None)], ids=["silent", "loud"])
def test_logits_of_zero_and_losses_beyond_a_number(
    factor: float, loss: float | None, pico: Pico, tmp_path: Path
) -> None:
    source = changed(pico("llama"), tmp_path / "dense", lambda tensors: tensors["model.norm.weight"].mul_(factor))
    result = upcycle.convert(str(source), tmp_path / "out", experts=2, verification={"tokens": 32}).verification
    assert result is not None
    assert result.verdict == "exact"
    content = strict(tmp_path / "out" / "verification.json")
    if loss is None:
        assert content["loss"] > 710
        assert content["perplexity"] is content["perplexity_dense"] is None
    else:
        assert "every logit of the dense side is zero" in result.explanation
        assert content["relative_logit_error"] == 0
        assert content["loss"] == pytest.approx(loss, rel=1e-6)
        assert content["perplexity"] == pytest.approx(4096, rel=1e-5)
    texts = upcycle.evaluate(tmp_path / "out", text="prose", tokens=40).as_dict()["texts"]
    assert texts[0]["nats_per_token"] > (710 if loss is None else 8)
    json.dumps(texts, allow_nan=False)


def test_ratios_and_texts_of_numbers_that_are_not_finite() -> None:
    assert relative(0.0, 0.0) == 0
    assert relative(4.0, 0.0) == math.inf
    assert math.isnan(relative(math.nan, 0.0))
    assert relative(4.0, 16.0) == 0.5
    assert perplexity_of(2.0) == math.exp(2.0)
    assert perplexity_of(710.0) == math.inf
    assert json_numbers({"a": [1.0, math.nan], "b": math.inf, "c": "x"}) == {"a": [1.0, None], "b": None, "c": "x"}
    assert said(None, ".1e") == said(math.inf, ".1e") == "not finite"
    assert said(1.5, ".1f") == "1.5"
    assert span([0.5, None, 0.25]) == "2.5e-01 to 5.0e-01, 1 not finite"
    assert span([math.inf]) == "1 not finite"


@pytest.mark.parametrize("side", ["dense", "moe"])
def test_logits_that_are_not_finite_are_a_fault_even_if_later_ones_are(side: str) -> None:
    """A later batch with finite logits must not hide them: neither the maximum nor the sums forget."""
    totals, ids = Totals(), torch.tensor([[1, 2, 3]])
    good, bad = torch.ones(1, 3, 5), torch.full((1, 3, 5), math.nan)
    totals.add(ids, bad if side == "dense" else good, bad if side == "moe" else good)
    totals.add(ids, good, good)
    assert totals.fault is not None
    assert ("dense" in totals.fault) == (side == "dense")
    assert math.isnan(totals.numbers["max_logit_difference"])
    assert math.isnan(totals.numbers["kl"])


def test_a_blueprint_says_how_layers_are_built_and_nothing_else(pico: Pico, tmp_path: Path) -> None:
    """A stranger's blueprint, whose recipe switches verification off and names files: the result is verified all the same."""
    keys = {"method": "random_split", "top_k": 8, "experts": 8, "verification": {"enabled": False}}
    upcycle.convert(str(pico("llama")), tmp_path / "first", **keys)
    saved = BlueprintFile(tmp_path / "first" / "blueprint.safetensors")
    tensors = load_file(saved.path)
    tensors["layers.0.routed"][0] = tensors["layers.0.routed"][1]
    recipe = saved.recipe | {
        "verification": {"enabled": False},
        "source": "/somewhere/else",
        "revision": "x",
        "sources": ["a", "b"],
        "tokenizer": "none",
        "trust_remote_code": True,
        "calibration": {"text": ["/home/somebody/notes.txt", "org/data", "prose"], "tokens": 64},
    }
    forged = tmp_path / "b.safetensors"
    save_file(tensors, forged, metadata={"upcycle": json.dumps(saved.header | {"recipe": recipe})})
    brought = blueprint_recipe(forged)
    assert not {"verification", "source", "revision", "sources", "tokenizer", "trust_remote_code"} & set(brought)
    assert brought["calibration"] == {"text": ["notes.txt", "org/data", "prose"], "tokens": 64}
    assert (brought["method"], brought["experts"], brought["seed"]) == ("random_split", 8, 0)
    with pytest.raises(VerificationError, match="did not keep its promise"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", blueprint=forged)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_report_on_logits_of_zero_holds_only_json_numbers(pico: Pico, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    from upcycle.report.collect import Wanted
    from upcycle.report.write_report import write_report

    def change(tensors: dict[str, torch.Tensor]) -> None:
        silence(tensors)
        tensors["model.norm.weight"].mul_(1e5)

    source = changed(pico("llama"), tmp_path / "dense", change)
    upcycle.convert(str(source), tmp_path / "out", experts=2, verification={"tokens": 32})
    text = tmp_path / "t.txt"
    text.write_text((DEMO_FOLDER / "text" / "prose.txt").read_text()[:3000])
    report = write_report(tmp_path / "out", tmp_path / "r.html", Wanted(tokens=64, texts=[str(text)]))
    assert strict(report.json)["quality"]["domains"][0]["perplexity"] is None
    assert "not finite" in report.html.read_text()
