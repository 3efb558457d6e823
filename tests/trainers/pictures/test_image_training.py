"""Training models of parts on conversations with images, against the loss of stock classes and plain formulas in fp64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_runs import (
    COPIES,
    ROUNDING,
    WIDE,
    first_step,
    mixed_rows,
    recipe,
    rows_of,
    stock,
    stock_batches,
    stock_loss,
)
from training_runs import on_ranks, run, steps, two_ranks

import upcycle
from upcycle.errors import UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.models.own.moe_block import MoeBlock
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.run.stage import check_reduction


def test_the_loss_is_that_of_the_stock_class_with_masked_labels(llava: Path, data: Path, tmp_path: Path) -> None:
    """Two conversations in a row, each with its own image, and passes of two rows: 16 of the 8 conversations, each twice."""
    expected = stock_loss(llava, data)
    packed = first_step(llava, tmp_path, data, {}, length=WIDE, micro_batch=2)
    assert packed["loss"] == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.long
def test_experts_that_are_copies_begin_with_the_dense_loss_and_balance_each_part_by_its_formula(
    llava: Path, moe: Path, data: Path, tmp_path: Path
) -> None:
    """Also where a pass has no image, so that an encoder's routers do not run: losses do not depend on how the batch is divided."""
    text = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    mixed = tmp_path / "mixed.jsonl"
    rows = [
        {**json.loads(line), "image": str(path)} for line, (path, *_) in zip(data.open(), rows_of(data), strict=True)
    ]
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:7], text]))
    balance = {"switch_balance": {"coefficient": 0.1, "fraction": "first", "scope": "sequence", "layers": "mean"}}
    tower = {**balance, "router_z": {"coefficient": 0.01, "layers": "mean"}}
    stage = {"losses": {"router_z": {"coefficient": 0.01}}, "tower_losses": {"vision": tower, "connector": tower}}
    alone = {"packing": "alone"}
    at_once = first_step(moe, tmp_path / "one", mixed, stage, data=alone)
    divided = first_step(moe, tmp_path / "many", mixed, stage, data=alone, micro_batch=1)
    for key in (key for key in at_once if key.startswith("loss")):
        assert divided[key] == pytest.approx(at_once[key], rel=ROUNDING), key
    dense = first_step(llava, tmp_path / "dense", mixed, {}, data=alone)
    assert at_once["loss"] == pytest.approx(dense["loss"], rel=ROUNDING)
    wanted = tower_losses(moe, data)
    for part in ("vision", "connector"):
        assert at_once[f"loss/{part}.switch_balance"] == pytest.approx(0.1 * wanted[part][0], rel=1e-5)
        assert at_once[f"loss/{part}.router_z"] == pytest.approx(0.01 * wanted[part][1], rel=1e-5)


@torch.no_grad()
def tower_losses(folder: Path, data: Path) -> dict[str, tuple[float, float]]:
    """CuMo's losses of the routers of encoder and connector on the first seven images, in fp64, image by image."""
    model = stock(folder)
    logits: dict[str, dict[str, list[torch.Tensor]]] = {"vision": {}, "connector": {}}
    for name, block in model.named_modules():
        part = "vision" if "vision_tower" in name else "connector" if "projector" in name else None
        if isinstance(block, MoeBlock) and part:
            found = logits[part].setdefault(name, [])
            block.router.register_forward_hook(lambda _, __, out, found=found: found.append(out[0]))
    for batch in stock_batches(folder, data)[:7]:
        model(**batch)
    made = {}
    for part, layers in logits.items():
        balances, z = [], []
        for images in layers.values():
            for image in images:
                chances = image.softmax(-1)
                first = torch.nn.functional.one_hot(image.argmax(-1), 4).double().mean(0)
                balances.append(4 * float((first * chances.mean(0)).sum()))
                z.append(float(image.logsumexp(-1).square().mean()))
        made[part] = sum(balances) / len(balances), sum(z) / len(z)
    return made


def changed(before: Path, after: str | None) -> set[str]:
    """Which parts have other weights."""
    assert after
    old, new = SafetensorsFolder(before), SafetensorsFolder(Path(after))
    assert set(old.specs) == set(new.specs)
    return {name for name in old.specs if not torch.equal(old.read(name), new.read(name))}


@pytest.mark.long
@pytest.mark.parametrize(
    ("train", "parts"),
    [(["connector"], {"projector"}), (["vision.router", "language.experts"], {"router", "experts"}), (["all"], set())],
)
def test_a_stage_trains_the_parts_that_it_names(
    train: list[str], parts: set[str], moe: Path, data: Path, tmp_path: Path
) -> None:
    keys = {"saving": {"export": True}, "stage": {"train": train}}
    result, _ = run(recipe(moe, tmp_path, data, keys.pop("stage"), **keys))
    names = changed(moe, result.model)
    for name in names:
        assert not parts or any(part in name for part in parts), name
        if train == ["vision.router", "language.experts"]:
            assert ("vision" in name) == ("router" in name), name
    kinds = {"vision", "projector", "language"} if train == ["all"] else parts
    assert all(any(kind in name for name in names) for kind in kinds), names


@pytest.mark.long
def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(moe: Path, data: Path, tmp_path: Path) -> None:
    stage = {"steps": 4, "tower_losses": {"vision": {"switch_balance": {}}}}
    keys: dict[str, Any] = {"global_batch": 4, "micro_batch": 2, "data": {"cache": str(tmp_path / "cache")}}
    whole = recipe(moe, tmp_path / "whole", data, stage, **keys)
    run(whole)
    parts = recipe(moe, tmp_path / "parts", data, stage, **keys)
    run(parts)
    newest = latest(tmp_path / "parts" / "run")
    assert newest
    shutil.rmtree(newest.folder)  # as if it had ended at step 2
    _, said = run(parts)
    assert any("continuing" in line for line in said)
    first, second = latest(tmp_path / "whole" / "run"), latest(tmp_path / "parts" / "run")
    assert first
    assert second
    assert first.state["files"] == second.state["files"]


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("changes", "stage", "why"),
    [
        ({"zero": {"stage": 3}}, {}, "zero.stage: 3 does not go with images"),
        ({"adapter": {"rank": 2}}, {}, "adapter does not go with images"),
        ({}, {"tower_losses": {"vision": {"switch_balance": {}}}}, "the model has no routers there"),
        ({"length": 24}, {}, "nothing is left to train on: 8 are too long"),
    ],
)
def test_what_does_not_go_with_images_is_refused(
    changes: dict[str, Any], stage: dict[str, Any], why: str, llava: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=why):
        run(recipe(llava, tmp_path, data, stage, **changes))


def test_gradients_that_ranks_have_in_unlike_orders_are_not_added_as_they_come(
    llava: Path, data: Path, tmp_path: Path
) -> None:
    """DeepSpeed's stage 2, and overlap_comm, would add those of different weights, without an error."""
    for zero in ({"stage": 2}, {"stage": 1, "settings": {"overlap_comm": True}}):
        divided = recipe(llava, tmp_path, data, {}, zero=zero)
        check_reduction(divided, divided.stages[0], 1)
        with pytest.raises(UsageError, match="adds up gradients in the order") as refused:
            check_reduction(divided, divided.stages[0], 2)
        assert refused.value.hint == "set zero.stage: 1, without overlap_comm"


@pytest.mark.long
def test_a_pass_without_images_where_encoders_alone_have_routers(llava: Path, data: Path, tmp_path: Path) -> None:
    """No router runs in it, and its losses are none: the global batch has those of its images."""
    upcycle.convert(str(llava), tmp_path / "seeing", part="vision", **COPIES)
    mixed, stage = mixed_rows(data, tmp_path), {"tower_losses": {"vision": {"switch_balance": {}}}}
    keys: dict[str, Any] = {"global_batch": 4, "data": {"packing": "alone"}}
    at_once = first_step(tmp_path / "seeing", tmp_path / "one", mixed, stage, micro_batch=4, **keys)
    divided = first_step(tmp_path / "seeing", tmp_path / "many", mixed, stage, micro_batch=1, **keys)
    for key in ("loss", "loss/vision.switch_balance"):
        assert divided[key] == pytest.approx(at_once[key], rel=ROUNDING), key


@pytest.mark.slow
def test_two_ranks_of_which_one_has_no_image_take_the_steps_of_one(moe: Path, data: Path, tmp_path: Path) -> None:
    """Ranks add up gradients of encoder and connector, which a rank whose rows are all text does not run."""
    mixed = mixed_rows(data, tmp_path)
    stage = {"steps": 3, "tower_losses": {"vision": {"switch_balance": {}}}}
    keys: dict[str, Any] = {"global_batch": 2, "micro_batch": 1, "data": {"packing": "alone"}}
    alone = recipe(moe, tmp_path / "one", mixed, stage, **keys)
    run(alone)
    both = two_ranks(alone, tmp_path / "two", zero={"stage": 1})
    on_ranks(both, 2)
    for key in ("loss", "loss/vision.switch_balance", "gradient_norm"):
        wanted = [line[key] for line in steps(alone)]
        assert [line[key] for line in steps(both)] == [pytest.approx(value, rel=1e-4) for value in wanted]
