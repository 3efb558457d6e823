"""Branch-Train-Merge: one dense model, the sources' mean by given weights or by what a text says of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import CheckpointError, UsageError
from upcycle.text.held_out import by_position
from upcycle.text.windows import encode

Branches = Callable[..., list[Path]]
MERGE: dict[str, Any] = {"method": "branch_train_merge", "verification": {"tokens": 64}}
WINDOW = 8


@pytest.fixture
def text(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "sample.txt"
    path.write_text("She sells sea shells by the sea shore, and the shells she sells are sea shells.")
    return {"calibration": {"text": str(path), "tokens": 16, "window": WINDOW}}


def mean_of(folders: list[Path], parts: list[float]) -> dict[str, np.ndarray]:
    stored = [load_file(folder / "model.safetensors") for folder in folders]
    return {
        name: sum(c * one[name].double().numpy() for c, one in zip(parts, stored, strict=True)) / sum(parts)
        for name in stored[0]
    }


def assert_mean(out: Path, folders: list[Path], parts: list[float]) -> None:
    expected = mean_of(folders, parts)
    made = load_file(out / "model.safetensors")
    assert set(made) == set(expected)
    for name, tensor in made.items():
        # Sums of fp64 in another order, then one rounding to fp32.
        assert np.allclose(tensor.numpy(), expected[name], rtol=2.0**-23, atol=0), name


def likelihoods(folder: Path, text: Path) -> np.ndarray:
    """``ln p(x_t | x_<t)`` of the first two windows."""
    ids = encode(load_tokenizer(folder), text.read_text())
    available = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    windows = available[[0, len(available) - 1]]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(windows).logits.double().numpy()
    found = np.zeros((2, WINDOW - 1))
    for n in range(2):
        for t in range(WINDOW - 1):
            row = logits[n, t]
            found[n, t] = row[windows[n, t + 1]] - row.max() - np.log(np.exp(row - row.max()).sum())
    return found


@pytest.mark.long
def test_given_weights(branches: Branches, tmp_path: Path) -> None:
    folders = branches(3)
    sources = [{"name": str(folder), "weight": weight} for folder, weight in zip(folders, (1, 2, 5), strict=True)]
    result = upcycle.convert(None, tmp_path / "out", sources=sources, **MERGE)
    assert_mean(tmp_path / "out", folders, [1, 2, 5])
    checked = result.verification
    assert checked is not None
    assert (checked.verdict, checked.compared_tensors) == (
        "approximate",
        len(load_file(tmp_path / "out" / "model.safetensors")),
    )
    assert result.plan.summary == "the mean of 3 models"
    assert result.merging is None
    assert upcycle.verify(tmp_path / "out", tokens=64) == checked
    assert upcycle.convert(str(tmp_path / "out"), tmp_path / "moe", experts=2, verification={"tokens": 64}).verification


@pytest.mark.long
@pytest.mark.parametrize("parameters", [{}, {"prior": "cached", "decay": 0.5}, {"most": 2}])
def test_weights_are_the_posteriors_on_a_text(
    parameters: dict[str, Any], text: dict[str, Any], branches: Branches, tmp_path: Path
) -> None:
    folders, prior = branches(3), [0.2, 0.3, 0.5]
    sources = [{"name": str(folder), "weight": 2 * weight} for folder, weight in zip(folders, prior, strict=True)]
    result = upcycle.convert(None, tmp_path / "out", sources=sources, parameters=parameters, **MERGE, **text)
    read_part = tmp_path / "read.txt"  # the last quarter is kept to verify on
    read_part.write_text(by_position(Path(text["calibration"]["text"]).read_text()).read)
    logs = np.stack([likelihoods(folder, read_part) for folder in folders])
    total, now = np.zeros(3), np.array(prior)
    for n in range(2):
        for t in range(WINDOW - 1):
            joint = [now[j] * math.exp(sum(logs[j, n, i] for i in range(t))) for j in range(3)]
            posterior = np.array(joint) / sum(joint)
            total += posterior / (2 * (WINDOW - 1))
        if parameters.get("prior") == "cached":
            now = 0.5 * now + 0.5 * posterior
    report = result.merging
    assert report is not None
    # fp32 logits up to a few tens, computed in batches of another size: their errors change logarithms of ratios by 1e-4.
    assert report["posterior"] == pytest.approx(total.tolist(), abs=1e-4)
    assert report["perplexity"] == pytest.approx(np.exp(-logs.mean((1, 2))).tolist(), rel=1e-4)
    expected = report["posterior"]
    if "most" in parameters:
        least = int(np.argmin(expected))
        expected = [0.0 if i == least else p / (1 - expected[least]) for i, p in enumerate(expected)]
    assert report["coefficients"] == pytest.approx(expected, abs=1e-12)
    assert sum(report["coefficients"]) == pytest.approx(1, abs=1e-12)
    assert_mean(tmp_path / "out", folders, report["coefficients"])
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert written["parameters"]["coefficients"] == report["coefficients"]
    recorded = json.loads((tmp_path / "out" / "upcycle.json").read_text())["merging"]
    named = {**report, "sources": ["model", "model-2", "model-3"], "text": {**report["text"], "text": ["sample.txt"]}}
    assert recorded == named, "files and models by name: no folder of this machine is published"
    assert json.loads((tmp_path / "out" / "growth.json").read_text()) == {"coefficients": report["coefficients"]}
    assert upcycle.verify(tmp_path / "out", tokens=64) == result.verification


@pytest.mark.long
def test_a_tensor_that_is_not_the_mean_is_found(branches: Branches, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from upcycle.files import hashing

    out = tmp_path / "out"
    upcycle.convert(None, out, sources=list(map(str, branches(2))), **MERGE)
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((out / "upcycle.json").read_text())
    record["files"]["model.safetensors"] = hashing.hash_file(out / "model.safetensors")
    (out / "upcycle.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight' is not"):
        upcycle.verify(out, tokens=64)


@pytest.mark.long
def test_a_plan(branches: Branches, text: dict[str, Any]) -> None:
    keys = {"method": "branch_train_merge", "sources": list(map(str, branches(3)))}
    plan = upcycle.plan(None, **keys, **text)
    assert (plan.calibration_tokens, plan.parameters_total) == (16, plan.parameters_dense)
    assert plan.promise == "approximate"
    decided = upcycle.plan(None, **keys, **text, parameters={"coefficients": [1, 0, 2]})
    assert decided.summary == "the mean of 2 models"
    assert "calibration text is not used" in " ".join(decided.warnings)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sources": ["{0}"]}, "averages several sources, and there is one"),
        ({"parameters": {"coefficients": [1, 2]}}, "needs 3 numbers that are 0 or positive"),
        ({"parameters": {"coefficients": [0, 0, 0]}}, "needs 3 numbers that are 0 or positive"),
        ({"parameters": {"coefficients": [1, -1, 3]}}, "needs 3 numbers that are 0 or positive"),
        ({"parameters": {"decay": 1.0}}, "key 'decay'"),
        ({"parameters": {"most": 0}}, "key 'most'"),
        ({"experts": 4}, "does not read the key 'experts'"),
        ({"calibration": "nowhere.txt"}, "no such calibration text"),
    ],
)
def test_bad_input(keys: dict[str, Any], message: str, branches: Branches, tmp_path: Path) -> None:
    folders = list(map(str, branches(3)))
    named = {"sources": [name.format(*folders) for name in keys.get("sources", folders)]}
    with pytest.raises(UsageError, match=message):
        upcycle.convert(None, tmp_path / "out", method="branch_train_merge", **{**keys, **named})
