"""Exported folders are what stock transformers, verify and evaluate take, in any layout and dtype."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_runs import recipe_for, run

import upcycle
from upcycle.architectures.stock import load_stock_model
from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.files.output.workspace import Workspace
from upcycle.trainers.checkpoints.export import export
from upcycle.trainers.checkpoints.read import latest

Model = Callable[..., Path]

EXPORTED = [
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe_text", "granitemoe", "glm4_moe", "lfm2_moe", "flex_olmo",
]  # fmt: skip


@pytest.mark.one_in(8)
@pytest.mark.parametrize("name", EXPORTED)
def test_the_export_is_stored_as_the_model_was_and_holds_the_trained_weights(
    pico_moe: Model, tmp_path: Path, name: str
) -> None:
    recipe = recipe_for(pico_moe(name), tmp_path, stage={"steps": 1, "losses": {}})
    run(recipe)
    result = export(recipe.output, tmp_path / "out")
    assert (result.dtype, result.step) == ("float32", 1)
    out, source = SafetensorsFolder(tmp_path / "out"), SafetensorsFolder(pico_moe(name))
    assert out.specs == source.specs
    saved = latest(Path(recipe.output))
    assert saved
    trained, loaded = load_stock_model(saved.folder).state_dict(), load_stock_model(tmp_path / "out").state_dict()
    assert set(trained) == set(loaded)
    assert all(torch.equal(trained[key], loaded[key]) for key in trained)
    before = load_stock_model(pico_moe(name)).state_dict()
    assert any(not torch.equal(before[key], loaded[key]) for key in loaded)


def test_other_layouts_and_dtypes(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 1})
    run(recipe)
    fused = export(recipe.output, tmp_path / "fused", layout="fused", dtype="bfloat16", max_shard_size="100KB")
    plain = export(recipe.output, tmp_path / "plain")
    assert (fused.layout, plain.layout) == ("fused", "per-expert")
    assert len(list((tmp_path / "fused").glob("*.safetensors"))) > 1
    specs = SafetensorsFolder(tmp_path / "fused").specs
    assert {spec.dtype for spec in specs.values()} == {"bfloat16"}
    assert "model.layers.0.mlp.experts.gate_up_proj" in specs
    one, two = load_stock_model(tmp_path / "fused").state_dict(), load_stock_model(tmp_path / "plain").state_dict()
    assert all(torch.equal(one[key], two[key].bfloat16().float()) for key in two)


@pytest.mark.long
def test_a_converted_model_stays_verifiable(pico: Model, tmp_path: Path) -> None:
    upcycle.convert(str(pico("llama")), tmp_path / "moe", experts=4, top_k=2, verification={"enabled": False})
    recipe = recipe_for(tmp_path / "moe", tmp_path, saving={"export": True})
    result, _ = run(recipe)
    assert result.model == str(tmp_path / "run" / "model")
    checked = upcycle.verify(result.model, tokens=64)
    assert (checked.verdict, checked.promise) == ("approximate", "trained")
    assert "trained for 6 steps" in checked.explanation
    assert checked.relative_logit_error > 1e-3
    measured = upcycle.evaluate(result.model, text="prose", tokens=200)
    assert measured.layers
    record = json.loads((tmp_path / "run" / "model" / "upcycle.json").read_text())
    assert record["training"]["tokens"] == 6 * 4 * 32
    again = recipe_for(Path(result.model), tmp_path / "again", stage={"steps": 1, "distillation": {}})
    assert run(again)[0].step == 1  # the parent is still known


def test_a_damaged_checkpoint_is_not_exported(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 1})
    run(recipe)
    saved = latest(Path(recipe.output))
    assert saved
    (tmp_path / "token").write_text("s3cret")
    (saved.folder / "NOTICE").symlink_to(tmp_path / "token")  # in a run of somebody else's
    with pytest.raises(CheckpointError, match="NOTICE is a link that leaves its folder"):
        export(saved.folder, tmp_path / "out")
    (saved.folder / "NOTICE").unlink()
    (file,) = saved.folder.glob("model-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        export(saved.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    file.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match="damaged"):
        export(saved.folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="damaged"):
        run(recipe)


def test_a_folder_that_is_no_checkpoint_is_refused(pico_moe: Model, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        export(pico_moe("mixtral"), tmp_path / "out")


@pytest.mark.long
def test_a_folder_is_overwritten_only_if_upcycle_wrote_it(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 1})
    run(recipe)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="upcycle did not write"):
            export(recipe.output, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "mine").read_text() == "keep"
    (tmp_path / "out" / "mine").unlink()
    export(recipe.output, tmp_path / "out")
    with pytest.raises(UsageError, match="is not empty"):
        export(recipe.output, tmp_path / "out")
    export(recipe.output, tmp_path / "out", overwrite=True, layout="fused")
    assert not (tmp_path / "out.replaced").exists()  # all of it was ours
    (tmp_path / "out" / "mine").write_text("keep")
    export(recipe.output, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out.replaced" / "mine").read_text() == "keep"


def test_an_export_never_deletes_what_it_exports_nor_unfinished_work(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 1})
    run(recipe)
    folder = tmp_path / "run"
    before = sorted(folder.rglob("*"))
    for out in (
        folder,
        folder / "checkpoints",
        folder / "checkpoints" / "step-00000001",
        tmp_path,
        folder / "checkpoints" / "new",
    ):
        for overwrite in (False, True):
            with pytest.raises(UsageError):
                export(folder, out, overwrite=overwrite)
    assert sorted(folder.rglob("*")) == before
    with Workspace(tmp_path / "moe", "a conversion") as workspace:
        (workspace.folder / "journal.jsonl").write_text("hours")
    with pytest.raises(UsageError, match="unfinished conversion"):
        export(folder, tmp_path / "moe", overwrite=True)
    assert (workspace.folder / "journal.jsonl").read_text() == "hours"
