"""Training models of parts on conversations with images, against the loss of stock classes and plain formulas in fp64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_chats import chats, draw, pictured, pictured_llava
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import on_ranks, recipe_for, run, steps, two_ranks

import upcycle
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import parse_json
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.models.own.moe_block import MoeBlock
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.run.shown_rows import shown_rows
from upcycle.trainers.run.stage import check_reduction

WIDE, ROUNDING = 128, 2e-6  # tokens that hold two conversations; fp32 sums in another order, of a few hundred products
COPIES: dict[str, Any] = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, "verification": {"tokens": 32}}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictured_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def moe(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in all parts, with routers that are random."""
    folder = tmp_path_factory.mktemp("copies") / "moe"
    upcycle.convert(str(llava), folder, part="all", **COPIES)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight conversations about an image each."""
    return chats(tmp_path_factory.mktemp("data"))


def recipe(model: Path, folder: Path, file: Path, stage: dict[str, Any], /, **changes: Any) -> Any:
    """A run of one step over all eight conversations, unless ``changes`` say otherwise."""
    given = {"domains": {"chat": str(file)}, "chat_template": "turns", "validation": {"fraction": 0.0, "batch": 2}}
    keys = {"length": 64, "global_batch": 8, "micro_batch": 8, "data": {**given, **changes.pop("data", {})}}
    return recipe_for(model, folder, stage={"losses": {}, "steps": 1, **stage}, **{**keys, **changes})


def first_step(*args: Any, **changes: Any) -> dict[str, Any]:
    made = recipe(*args, **changes)
    run(made)
    return steps(made)[0]


def rows_of(data: Path) -> list[tuple[Path, str, str]]:
    found = []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        asked, said = (message["value"] for message in row["conversations"])
        found.append((data.parent / row["image"], asked, said))
    return found


def stock_batches(folder: Path, data: Path) -> list[dict[str, torch.Tensor]]:
    """Every conversation as the stock processor makes it of the text that ``turns`` writes; labels are those of answers."""
    from PIL import Image
    from transformers import AutoProcessor

    processor, batches = AutoProcessor.from_pretrained(folder), []
    for path, asked, said in rows_of(data):
        mark = str(processor.image_token)
        prompt = f"User: {asked}\nAssistant:".replace("<image>", mark)
        image = {"images": [Image.open(path)], "return_tensors": "pt", "add_special_tokens": False}
        batch = processor(text=[f"{prompt} {said}<|endoftext|>\n"], **image)
        labels = batch["input_ids"].clone()
        labels[:, : processor(text=[prompt], **image)["input_ids"].shape[1]] = -100
        labels[:, -1] = -100
        batches.append({**batch, "labels": labels})
    return batches


def stock(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).train()


@torch.no_grad()
def stock_loss(folder: Path, data: Path) -> float:
    """The mean over all answers' tokens of the stock class's own loss, in fp64."""
    model, nats, count = stock(folder), 0.0, 0
    for batch in stock_batches(folder, data):
        learned = int((batch["labels"][:, 1:] != -100).sum())
        nats, count = nats + learned * float(model(**batch).loss), count + learned
    return nats / count


def test_the_loss_is_that_of_the_stock_class_with_masked_labels(llava: Path, data: Path, tmp_path: Path) -> None:
    """Two conversations in a row, each with its own image, and passes of two rows: 16 of the 8 conversations, each twice."""
    expected = stock_loss(llava, data)
    packed = first_step(llava, tmp_path, data, {}, length=WIDE, micro_batch=2)
    assert packed["loss"] == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.long
@pytest.mark.parametrize("wrapper", ["llava_next", "idefics3"])
def test_images_of_other_sizes_in_models_of_other_classes(wrapper: str, tmp_path: Path) -> None:
    """Tiles, marks around images, and as many tokens as an image's size asks for; two images of unequal sizes in a pass."""
    folder, data = pictured(tmp_path / wrapper, wrapper), chats(tmp_path / "data", 4)
    for number, size in enumerate([(16, 16), (32, 16), (24, 32), (20, 28)]):
        draw(data.parent / "images", f"{number}.png", (200, 40 * number, 30), size)
    expected = stock_loss(folder, data)
    keys: dict[str, Any] = {"length": 256, "global_batch": 4, "micro_batch": 2, "data": {"packing": "alone"}}
    assert first_step(folder, tmp_path, data, {}, **keys)["loss"] == pytest.approx(expected, rel=ROUNDING)


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
def test_an_unreadable_image_in_the_middle_of_a_run_is_skipped_and_one_too_many_ends_it(
    llava: Path, data: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(data.parent, mine)
    whole = recipe(llava, tmp_path / "a", mine / data.name, {}, data={"bad_images": 1})
    shown_rows(whole, 1, lambda _: None)  # the data are checked, and kept in the cache
    (mine / "images" / "5.png").write_bytes(b"no image any more")
    _, said = run(whole)
    assert [line for line in said if "5.png" in line and "not learned from (1 of at most 1)" in line], said
    fewer = tmp_path / "fewer.jsonl"
    kept = [
        json.loads(line) | {"image": str(path)} for line, (path, *_) in zip(data.open(), rows_of(data), strict=True)
    ]
    fewer.write_text("".join(json.dumps(row) + "\n" for row in kept if row["id"] != 5))
    rest = stock_loss(llava, fewer)
    assert steps(whole)[0]["loss"] == pytest.approx(rest, rel=ROUNDING)
    (mine / "images" / "6.png").write_bytes(b"nor this")
    with pytest.raises(UsageError, match=r"number 2 in this run, and data.bad_images is 1"):
        run(whole, restart=True)
    (mine / "images" / "6.png").unlink()
    with pytest.raises(UsageError, match=r"6.png is gone since the data were checked"):
        run(whole, restart=True)


def test_an_image_that_cannot_be_read_is_found_before_the_first_step(llava: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data.parent, tmp_path / "mine")
    (tmp_path / "mine" / "images" / "2.png").write_bytes(b"no image")
    mine = tmp_path / "mine" / data.name
    with pytest.raises(UsageError, match=r"line 3: the image .*2.png cannot be read: it is no image"):
        run(recipe(llava, tmp_path, mine, {}))
    said: list[str] = []
    (row,) = shown_rows(recipe(llava, tmp_path, mine, {}, data={"broken_lines": "skip"}), 1, said.append)
    assert any("1 rows that cannot be read are left out" in line and "2.png" in line for line in said), said
    assert any("7 images, whose headers were read" in line for line in said), said
    assert row.documents[0][0].text.startswith("User: <image> (x 16)\nWhat is picture")
    assert not row.documents[0][0].learned


def test_images_that_came_or_got_another_size_are_read_again(llava: Path, data: Path, tmp_path: Path) -> None:
    """Their file of rows is the same, and its rows were tokenised by what images were before."""
    shutil.copytree(data.parent, tmp_path / "mine")
    images, said = tmp_path / "mine" / "images", []
    (images / "2.png").rename(images / "away")
    (images / "5.png").write_bytes(b"no image")
    mine = recipe(llava, tmp_path, tmp_path / "mine" / data.name, {}, data={"broken_lines": "skip"})
    shown_rows(mine, 1, said.append)
    assert any("6 images, whose headers were read" in line for line in said), said
    (images / "away").rename(images / "2.png")
    draw(images, "4.png", (9, 9, 9), (8, 16))
    shown_rows(mine, 1, said.append)
    assert any("7 images, whose headers were read" in line for line in said), said
    cached = [parse_json(file.metadata()["pictures"], "index") for file in indices(tmp_path / "cache")]
    assert ["4.png", 8, 16] in [[Path(path).name, *size] for shard in cached for ((path, *size),) in shard]
    run(mine)
    assert (tmp_path / "run" / "log.jsonl").exists()


def indices(cache: Path) -> list[Any]:
    """The indices of all tokenised shards."""
    return [safe_open(path, framework="numpy") for path in cache.rglob("*.safetensors")]


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


@pytest.fixture(scope="module")
def teacher(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other logits."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    shutil.copytree(llava, folder)
    tensors = load_file(folder / "model.safetensors")
    (head,) = (name for name in tensors if name.endswith("lm_head.weight"))
    tensors[head] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def pairs_of(data: Path, folder: Path) -> Path:
    """A right and a wrong answer about every image."""
    rows = [
        {"image": str(path), "prompt": asked, "chosen": said, "rejected": "It is black."}
        for path, asked, said in rows_of(data)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PREFER: dict[str, Any] = {"logits": 0.0, "next_token": 0.0, "preference": 1.0, "beta": 0.5}
PAIRS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}


@pytest.mark.long
def test_copies_mimic_their_parent_from_the_start_and_prefer_nothing_over_it(
    llava: Path, moe: Path, data: Path, tmp_path: Path
) -> None:
    """KL of copies from what they are copies of is 0, and a pair's loss is log 2: both read the image."""
    mimic = {"distillation": {"parent": str(llava), "logits": 1.0, "next_token": 0.0}}
    assert abs(first_step(moe, tmp_path / "a", data, mimic)["loss/kl"]) < 1e-5
    domain = {"prefer": {"text": str(pairs_of(data, tmp_path)), **PAIRS}}
    prefer = {"distillation": {"parent": str(llava), **PREFER}}
    line = first_step(moe, tmp_path / "b", data, prefer, length=WIDE, data={"domains": domain})
    assert line["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.long
def test_mimicry_and_preference_are_the_papers_formulas(llava: Path, teacher: Path, data: Path, tmp_path: Path) -> None:
    """LLaVA-MoD's losses in fp64, of stock classes on what the stock processor makes of each conversation."""
    mimic = {"distillation": {"parent": str(teacher), "logits": 1.0, "next_token": 0.0}}
    found = first_step(llava, tmp_path / "a", data, mimic)["loss/kl"]
    student, parent, nats, count = stock(llava), stock(teacher), 0.0, 0
    for batch in stock_batches(llava, data):
        labels = batch.pop("labels")
        with torch.no_grad():
            q, p = (model(**batch).logits.log_softmax(-1)[0, :-1] for model in (student, parent))
        learned = labels[0, 1:] != -100
        nats += float((p.exp() * (p - q)).sum(-1)[learned].sum())
        count += int(learned.sum())
    assert found == pytest.approx(nats / count, rel=1e-4)
    domain = {"prefer": {"text": str(pairs_of(data, tmp_path)), **PAIRS}}
    prefer = {"distillation": {"parent": str(teacher), **PREFER}}
    found = first_step(llava, tmp_path / "b", data, prefer, length=WIDE, data={"domains": domain})["loss/preference"]
    worse = data.parent / "worse.jsonl"
    rows = [json.loads(line) for line in data.open()]
    for row in rows:
        row["conversations"][1]["value"] = "It is black."
    worse.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sides = [said(model, file) for model in (student, parent) for file in (data, worse)]
    margins = [(sw - tw) - (sl - tl) for sw, sl, tw, tl in zip(*sides, strict=True)]
    wanted = sum(-math.log(1 / (1 + math.exp(-0.5 * margin))) for margin in margins) / len(margins)
    assert found == pytest.approx(wanted, rel=1e-4)


@torch.no_grad()
def said(model: Any, data: Path) -> list[float]:
    """The log probability of every answer."""
    found = []
    for batch in stock_batches(Path(model.config.name_or_path), data):
        labels = batch.pop("labels")[0, 1:]
        chances = model(**batch).logits.log_softmax(-1)[0, :-1]
        learned = labels != -100
        found.append(float(chances[learned].gather(1, labels[learned][:, None]).sum()))
    return found


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


def mixed_rows(data: Path, folder: Path) -> Path:
    """Two conversations with an image and two of text, by turns."""
    text = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    rows = [
        json.loads(line) | {"image": str(path)} for line, (path, *_) in zip(data.open(), rows_of(data), strict=True)
    ]
    mixed = folder / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], text | {"id": 1}, rows[1], text | {"id": 2}]))
    return mixed


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
