"""Experts and routers that are trained behind the closed form: never worse on what judges, stored as they are measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import read_json

Models = Callable[..., Path]
KEYS: dict[str, Any] = {
    "method": "frequency",
    "keep": 0.75,
    "calibration": {"text": "demo", "tokens": 1024, "window": 32},
    "verification": {"enabled": False},
}
QUICK = {"passes": 3, "batch": 128, "rate": 0.02}


def compressed(source: Path, out: Path, refit: str, **training: Any) -> dict[str, torch.Tensor]:
    keys = {**KEYS, "refit": refit, **({"reconstruction": {**QUICK, **training}} if refit == "blocks" else {})}
    upcycle.convert(str(source), out, **keys)
    return load_file(out / "model.safetensors")


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("name", "fused"), [("mixtral", False), ("dots1", True), ("granitemoe", True)])
def test_training_moves_experts_and_routers_and_helps(name: str, fused: bool, pico_moe: Models, tmp_path: Path) -> None:
    source = pico_moe(name, fused)
    closed = compressed(source, tmp_path / "closed", "down")
    trained = compressed(source, tmp_path / "trained", "blocks")
    assert set(closed) == set(trained)
    changed = {key for key in closed if not torch.equal(closed[key], trained[key])}
    assert all("expert" in key or "gate" in key or "linear" in key or "router" in key for key in changed)
    assert any("gate.weight" in key or "router" in key for key in changed)
    assert len(changed) >= 3
    before, after = (
        [*read_json(tmp_path / folder / "compression.json")["refit"].values()] for folder in ("closed", "trained")
    )
    assert all(new["steps"] > 0 for new in after)
    # A layer that training did not help keeps the closed form, and so do the inputs of the next one: the first that differs has the
    # same inputs in both.
    gained = [
        old["missing_after"] - new["missing_after"]
        for old, new in zip(before, after, strict=True)
        if old["missing_after"] != new["missing_after"]
    ]
    assert gained[0] > 0
    _, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "trained", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading


def test_a_layer_that_is_not_better_keeps_the_closed_form(pico_moe: Models, tmp_path: Path) -> None:
    closed = compressed(pico_moe("mixtral"), tmp_path / "closed", "down")
    wild = compressed(pico_moe("mixtral"), tmp_path / "wild", "blocks", rate=1.0)
    assert all(torch.equal(closed[key], wild[key]) for key in closed)


@pytest.mark.long
def test_verify_and_another_run_agree(pico_moe: Models, tmp_path: Path) -> None:
    keys = {**KEYS, "refit": "blocks", "reconstruction": QUICK, "verification": {"tokens": 64}}
    results = [upcycle.convert(str(pico_moe("mixtral")), tmp_path / folder, **keys) for folder in ("one", "two")]
    assert results[0].plan.refit == "blocks"
    one, two = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two
    assert upcycle.verify(tmp_path / "one", tokens=64) == results[0].verification


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["mixtral", "dots1", "flex_olmo"])  # shared experts; a norm behind the FFN
def test_the_ffns_of_a_dense_model_are_trained_towards_the_experts(name: str, pico_moe: Models, tmp_path: Path) -> None:
    keys = {**KEYS, "method": "to_dense", "width": 48}
    del keys["keep"]
    for refit in ("down", "blocks"):
        told = {**keys, "refit": refit, **({"reconstruction": QUICK} if refit == "blocks" else {})}
        upcycle.convert(str(pico_moe(name)), tmp_path / refit, **told)
    closed, trained = (load_file(tmp_path / refit / "model.safetensors") for refit in ("down", "blocks"))
    assert set(closed) == set(trained)
    changed = {key for key in closed if not torch.equal(closed[key], trained[key])}
    assert changed
    assert all(any(part in key for part in ("gate_proj", "up_proj", "down_proj")) for key in changed)
    before, after = (
        [*read_json(tmp_path / refit / "compression.json")["refit"].values()] for refit in ("down", "blocks")
    )
    assert all(new["steps"] > 0 for new in after)
    gained = [old["missing_after"] - new["missing_after"] for old, new in zip(before, after, strict=True)]
    assert next(gain for gain in gained if gain) > 0  # the first layer that differs has the same inputs in both
    _, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "blocks", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading


@pytest.mark.parametrize("method", ["qmoe"])
def test_what_has_no_experts_to_train_is_refused(method: str, pico_moe: Models) -> None:
    with pytest.raises(UsageError, match="refit: blocks") as caught:
        upcycle.plan(str(pico_moe("mixtral")), **{**KEYS, "method": method, "refit": "blocks"})
    assert "--refit down" in str(caught.value.hint)
