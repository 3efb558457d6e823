"""Training models of parts on text: the text model learns, all other parts stay as they are, bit by bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_towers import CASES
from training_runs import recipe_for, run, steps

import upcycle
from upcycle.architectures.stock import load_stock_model
from upcycle.errors import UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.data.packed_attention import packed_forward, packing_leak
from upcycle.trainers.data.packing import PackedBatch
from upcycle.trainers.routing.stock_routers import moe_layers

pytestmark = pytest.mark.one_in(12)  # the other cases are long

Tower = Callable[..., Path]
SPLIT: dict[str, Any] = {"method": "random_split", "experts": 4, "top_k": 2, "verification": {"tokens": 64}}


@pytest.fixture
def converted(tower: Tower, tmp_path: Path) -> Path:
    upcycle.convert(str(tower("llava", "llama")), tmp_path / "moe", **SPLIT)
    return tmp_path / "moe"


@pytest.mark.one_in(15)
@pytest.mark.parametrize(("wrapper", "text"), CASES)
def test_documents_are_apart_or_the_leak_is_named(wrapper: str, text: str, tower: Tower) -> None:
    check_packing(tower(wrapper, text))


@pytest.mark.parametrize(
    ("wrapper", "text"), [("qwen2_5_vl", "qwen2.5-vl"), ("qwen3_vl", "qwen3-vl"), ("qwen3_5", "qwen3.5-vl")]
)
def test_documents_are_apart_in_moes_of_other_classes(wrapper: str, text: str, tower: Tower, tmp_path: Path) -> None:
    upcycle.convert(str(tower(wrapper, text)), tmp_path / "moe", **SPLIT)
    check_packing(tmp_path / "moe")


@torch.no_grad()
def check_packing(folder: Path) -> None:
    model = load_stock_model(folder)
    ids = torch.randint(5, 4000, (2, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(8), torch.arange(12)]).expand(2, -1)
    packed = packed_forward(model, PackedBatch(ids, torch.ones_like(ids), positions, ("x",) * 2)).logits[:, 8:]
    alone = model(input_ids=ids[:, 8:], use_cache=False).logits
    error = (packed - alone).norm() / alone.norm()
    if packing_leak(model.config, rows=2) is None:
        assert error < 1e-5
    else:
        assert error > 1e-3, "a leak that is none"


@pytest.mark.long
def test_the_text_model_trains_and_all_else_stays(converted: Path, tower: Tower, tmp_path: Path) -> None:
    distillation = {"parent": "auto", "logits": 0.5, "hidden": 0.5, "ffn": 0.5}
    stage = {"distillation": distillation}
    result, said = run(recipe_for(converted, tmp_path, stage=stage, saving={"every": 9, "export": True}))
    lines = steps(recipe_for(converted, tmp_path, stage=stage))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert all(line["loss/switch_balance"] >= 0.0199 for line in lines)
    assert any("multi_modal_projector, vision_tower" in line and "stay as they are" in line for line in said), said
    assert result.model
    before, after = SafetensorsFolder(converted), SafetensorsFolder(Path(result.model))
    assert set(before.specs) == set(after.specs)
    for name in before.specs:
        of_text = name.startswith("language_model.")
        assert torch.equal(before.read(name), after.read(name)) != of_text, name
    assert upcycle.verify(result.model, source=str(tower("llava", "llama"))).verdict == "approximate"


@pytest.mark.long
@pytest.mark.parametrize("part", ["all", ["vision", "language"], ["vision", "connector"]])
def test_experts_of_other_parts_stay_and_losses_see_routers_of_the_text_model_alone(
    part: Any, tower: Tower, tmp_path: Path
) -> None:
    """Also where the text model is dense, which then trains as any dense model does."""
    moe = tmp_path / "moe"
    upcycle.convert(str(tower("llava", "llama")), moe, **{**SPLIT, "method": "sparse_upcycling", "part": part})
    dense = part == ["vision", "connector"]
    model = load_stock_model(moe)
    assert [layer.index for layer in moe_layers(model)] == ([] if dense else [0, 1, 2])
    losses = {} if dense else {"switch_balance": {}, "router_z": {}}
    result, said = run(recipe_for(moe, tmp_path, stage={"losses": losses}, saving={"every": 9, "export": True}))
    assert any("multi_modal_projector, vision_tower" in line and "stay as they are" in line for line in said), said
    assert result.model
    before, after = SafetensorsFolder(moe), SafetensorsFolder(Path(result.model))
    assert set(before.specs) == set(after.specs)
    for name in before.specs:
        of_text = name.startswith("language_model.")
        assert torch.equal(before.read(name), after.read(name)) != of_text, name


@pytest.mark.long
@pytest.mark.parametrize("zero", [0, 3, pytest.param(2, marks=pytest.mark.slow)])
def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(zero: int, converted: Path, tmp_path: Path) -> None:
    whole = recipe_for(converted, tmp_path / "whole", zero={"stage": zero})
    run(whole)
    parts = recipe_for(converted, tmp_path / "parts", zero={"stage": zero}).model_copy(update={"data": whole.data})
    run(parts)
    newest = latest(tmp_path / "parts" / "run")
    assert newest
    shutil.rmtree(newest.folder)  # as if it had ended at step 4
    _, said = run(parts)
    assert any("continuing" in line for line in said)
    first, second = latest(tmp_path / "whole" / "run"), latest(tmp_path / "parts" / "run")
    assert first
    assert second
    assert first.state["files"] == second.state["files"]  # SHA-256 of all weights and optimizer states


def test_other_parts_are_not_chosen_by_name(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train: '\*vision_tower\*' matches no parameter"):
        run(recipe_for(converted, tmp_path, stage={"steps": 1, "train": ["*vision_tower*"]}))
