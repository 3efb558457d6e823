"""Mimicry of a teacher that reads the same images, and preferences beside it, against the papers' formulas in fp64."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_runs import (
    WIDE,
    first_step,
    rows_of,
    stock,
    stock_batches,
)
from safetensors.torch import load_file, save_file


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
