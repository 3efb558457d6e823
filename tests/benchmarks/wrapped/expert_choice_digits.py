"""Expert choice on a vision transformer of handwritten digits, beside top-k at the same mean number of experts.

The model (``tests/benchmarks/support/digits_vit.py``) is converted by the command in two ways:

- split: the 256 neurons of every FFN become 8 experts of 32, with ridge routers fitted on the training images;
- upcycled: 8 copies of every FFN with random routers, two per token, as Sparse Upcycling does it for vision.

Each is run by expert choice with capacity c, and by top-k with k = c, untrained and after fine-tuning on the same images in the same
order, as the dense model is. The load is that of the fullest expert over an equal share, and a token is left out where no expert
takes it; both are means over layers, on the held-out images.

    python -P tests/benchmarks/wrapped/expert_choice_digits.py --out docs/measured/expert_choice.md
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    *(str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)),
    str(Path(__file__).resolve().parents[1] / "training"),
]

import torch
from calibrated_encoders import PROCESSOR, image_folders
from digits_vit import BATCH, accuracy, digits, digits_vit
from torch.nn.functional import cross_entropy
from training_curves import write_page
from transformers import AutoModelForImageClassification

import upcycle
import upcycle.models
from upcycle.models.own.moe_block import MoeBlock

EXPERTS, COPIES_K = 8, 2
CAPACITIES = (4, 2, 1)
RATE = 1e-3
SPLIT: dict[str, Any] = {"method": "weight_kmeans", "experts": EXPERTS, "router": "ridge", "refit": "none"}
COPIES: dict[str, Any] = {"experts": EXPERTS, "router": "random"}


@dataclass(frozen=True)
class Point:
    """One model at one time: accuracy, loss, load of the fullest expert, share of tokens that are left out; None: it is dense."""

    accuracy: float
    loss: float
    load: float | None = None
    left_out: float | None = None


def measured(model: Any) -> Point:
    """Accuracy and loss on held-out images, and what the routers do there."""
    _, (images, labels) = digits()
    blocks = [module for module in model.modules() if isinstance(module, MoeBlock)]
    chosen: list[torch.Tensor] = []
    hooks = [block.router.register_forward_hook(lambda _, __, made: chosen.append(made[2])) for block in blocks]
    with torch.no_grad():
        loss = cross_entropy(model.eval()(pixel_values=images).logits, labels).item()
    for hook in hooks:
        hook.remove()
    if not blocks:
        return Point(accuracy(model, images, labels), loss)
    counts = [torch.bincount(ids.flatten(), minlength=EXPERTS + 1)[:EXPERTS].double() for ids in chosen]
    load = fmean(float(count.max() / count.mean()) for count in counts)
    left = fmean(float((ids == EXPERTS).all(1).double().mean()) for ids in chosen)
    return Point(accuracy(model, images, labels), loss, load, left)


def tuned(model: Any, epochs: int, seed: int) -> Point:
    """The same after fine-tuning on the training images."""
    (images, labels), _ = digits()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    model.train()
    for _ in range(epochs):
        for some in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].split(BATCH):
            loss = cross_entropy(model(pixel_values=images[some]).logits, labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return measured(model)


def mean(points: Sequence[Point]) -> Point:
    """The mean over seeds."""
    found = [[getattr(point, name) for point in points] for name in ("accuracy", "loss", "load", "left_out")]
    return Point(*(None if values[0] is None else fmean(values) for values in found))  # type: ignore[arg-type]


def row(name: str, before: Point, after: Point) -> str:
    """A line of the table."""
    cells = []
    for point in (before, after):
        cells += [f"{point.accuracy:.2%}, {point.loss:.3f}"]
        cells += ["" if point.load is None else f"{point.load:.2f}, {point.left_out:.0%}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Convert, run, train and print the table; with ``--out`` it is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [
        f"| | untrained: accuracy, loss | load, left out | after {options.epochs} epochs | load, left out |",
        "|---|---:|---:|---:|---:|",
    ]

    def add(name: str, folder: Path) -> None:
        pairs = []
        for seed in range(options.seeds):
            model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
            pairs.append((measured(model), tuned(model, options.epochs, seed)))
        lines.append(row(name, *(mean(side) for side in zip(*pairs, strict=True))))
        print(lines[-1], file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as place:
        train, _ = image_folders(Path(place) / "images")
        dense = Path(place) / "vit"
        shutil.copytree(digits_vit(), dense)
        (dense / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        add("dense", dense)
        for name, keys, amounts in (("split", SPLIT, CAPACITIES), ("upcycled", COPIES, (COPIES_K,))):
            told = {**keys, "target": "upcycle_moe", "verification": {"enabled": False}}
            if name == "split":
                told["calibration"] = {"text": [str(train)]}
            for amount in amounts:
                # Pieces are summed, each at the weight of its score (of equal scores, 1); copies are averaged.
                choice = {"rule": "expert_choice", "capacity_factor": amount, "normalized": name != "split"}
                for rule, routing in (("expert choice", {"routing": choice}), ("top-k", {"top_k": amount})):
                    out = Path(place) / f"{name}-{rule}-{amount}"
                    upcycle.convert(str(dense), out, **told, **routing)
                    add(f"{name}, {amount} of {EXPERTS}, {rule}", out)
    table = "\n".join(lines) + "\n"
    print(table)
    if options.out:
        write_page(options.out, "Expert choice on handwritten digits", "wrapped/expert_choice_digits.py", table)


if __name__ == "__main__":
    main()
