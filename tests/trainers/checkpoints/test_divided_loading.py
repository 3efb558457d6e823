"""Weights that are divided while they are read give the run, bit for bit, that weights loaded whole give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe_for, run, steps

pytest.importorskip("deepspeed")

from upcycle.errors import CheckpointError
from upcycle.files.formats.tensor_files import SafetensorsFile
from upcycle.models.load import open_layers
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.run import stage as staging

Model = Callable[..., Path]
THREE = {"zero": {"stage": 3}}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    found = latest(folder)
    assert found
    files = [SafetensorsFile(found.folder / name) for name in found.state["files"]]
    return {name: file.read(name) for file in files for name in file.specs}


CASES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"stage": {"control": {"noise": "learned"}}}),
    ("glm4_moe", {"stage": {"losses": {}, "balance": {"rate": 0.01}}}),
    ("qwen2_moe", {"dtype": "bfloat16", "stage": {"train": ["router", "*norm*"]}}),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("name", "changes"), CASES, ids=[name for name, _ in CASES])
def test_the_same_run_as_with_weights_loaded_whole(
    name: str, changes: dict[str, Any], pico_moe: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico_moe(name)
    told: dict[str, Any] = {**changes, "stage": {"steps": 2, **changes["stage"]}}
    divided = recipe_for(model, tmp_path / "divided", **THREE, **told)
    opened: list[Any] = []

    def watched(*arguments: Any, **named: Any) -> Any:
        opened.append(open_layers(*arguments, **named))
        assert all(weight.is_meta for weight in opened[-1].model.parameters())
        return opened[-1]

    monkeypatch.setattr(staging, "open_layers", watched)
    run(divided)
    assert len(opened) == 1
    monkeypatch.setattr(staging, "open_layers", lambda *_, **__: None)
    whole = recipe_for(model, tmp_path / "whole", **THREE, **told)
    run(whole)
    assert steps(divided) == steps(whole)
    ours, theirs = saved(tmp_path / "divided" / "run"), saved(tmp_path / "whole" / "run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[each], theirs[each]) for each in theirs)


@pytest.mark.long
def test_a_divided_run_continues_bit_for_bit(pico_moe: Model, tmp_path: Path) -> None:
    import shutil

    recipe = recipe_for(pico_moe("qwen3_moe"), tmp_path, **THREE, saving={"every": 3})
    run(recipe)
    first, log = saved(tmp_path / "run"), steps(recipe)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    run(recipe)
    assert steps(recipe) == log
    again = saved(tmp_path / "run")
    assert all(torch.equal(again[each], value) for each, value in first.items())


@pytest.mark.long
def test_weights_that_an_export_would_lose_are_refused(pico_moe: Model, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(pico_moe("mixtral"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] - 1}))
    with pytest.raises(CheckpointError, match=r"no weights for .*layers\.1\."):
        run(recipe_for(model, tmp_path, **THREE))
