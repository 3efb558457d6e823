"""Small runs on conversations with images, and what stock classes make of the same conversations in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from training_runs import recipe_for, run, steps

WIDE, ROUNDING = 128, 2e-6  # tokens that hold two conversations; fp32 sums in another order, of a few hundred products
COPIES: dict[str, Any] = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, "verification": {"tokens": 32}}


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


def mixed_rows(data: Path, folder: Path) -> Path:
    """Two conversations with an image and two of text, by turns."""
    text = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    rows = [
        json.loads(line) | {"image": str(path)} for line, (path, *_) in zip(data.open(), rows_of(data), strict=True)
    ]
    mixed = folder / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], text | {"id": 1}, rows[1], text | {"id": 2}]))
    return mixed
