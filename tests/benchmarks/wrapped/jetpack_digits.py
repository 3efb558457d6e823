"""Recycles a vision transformer trained on handwritten digits into SpheroMoE (MoE Jetpack), and fine-tunes the result shortly.

The upper three of six layers get experts, as in the paper, or with ``all`` as an argument all of them. They are compared with experts
of random weights behind the same dense layers, and with a model that is random altogether: same architecture, same steps, same images,
two seeds each.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
from digits_vit import BATCH, accuracy, digits, digits_vit
from measure import Row, report
from torch.nn.functional import cross_entropy

from upcycle.models.own.recycling import recycle
from upcycle.models.own.slots import SlotBlock

SIZES: dict[str, Any] = {"core": 8, "universal": 16}  # of 17 tokens: about half as many, and about as many
AFTER, RATE, SEEDS = (0, 1, 3), 1e-3, 2


def randomize(model: Any, seed: int, whole: bool) -> None:
    """Draw the experts' weights anew as the stock class would, or all weights."""
    torch.manual_seed(seed)
    if whole:
        model.apply(model._init_weights)
    with torch.no_grad():
        for block in (module for module in model.modules() if isinstance(module, SlotBlock)):
            for name, weight in block.experts.named_parameters():
                weight.zero_() if "bias" in name else weight.normal_(std=0.02)


def fine_tuned(model: Any, seed: int) -> list[float]:
    """Accuracies on held-out images after so many epochs as ``AFTER`` says."""
    (images, labels), held = digits()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    found = []
    for epoch in range(max(AFTER) + 1):
        if epoch in AFTER:
            found.append(accuracy(model, *held))
        if epoch == max(AFTER):
            break
        model.train()
        for some in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].split(BATCH):
            loss = cross_entropy(model(pixel_values=images[some]).logits, labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return found


def main() -> int:
    """Recycle, train and compare; returns the exit code."""
    from transformers import ViTForImageClassification

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="?", choices=("last-half", "all"), default="last-half", help="that get experts")
    layers = parser.parse_args().layers
    (images, _), held = digits()
    dense = ViTForImageClassification.from_pretrained(digits_vit())
    print(f"dense: {accuracy(dense, *held):.2%}")
    inputs = [{"pixel_values": images}]
    ways = {"recycled by activation": (inputs, None), "recycled by weights": ((), None)}
    ways |= {"experts random": ((), False), "all random": ((), True)}
    results: dict[str, list[float]] = {}
    for name, (read, random) in ways.items():
        runs = []
        for seed in range(SEEDS):
            model = recycle([dense], read, **SIZES, layers=layers, seed=seed)
            if random is not None:
                randomize(model, seed, random)
            runs.append(fine_tuned(model, seed))
        results[name] = [sum(run[i] for run in runs) / SEEDS for i in range(len(AFTER))]
        print(name, *(f"{share:.2%}" for share in results[name]), flush=True)
    rows = []
    for i, after in enumerate(AFTER):
        best, plain, nothing = (results[n][i] for n in ("recycled by activation", "experts random", "all random"))
        passed = best > nothing if after else None
        other = f"experts random {plain:.2%}"
        rows.append(Row(f"after {after} epochs", f"{best:.2%}", f"{nothing:.2%}", other, "better", passed))
    return report("accuracy on held-out digits, mean of two seeds", ("recycled", "all random"), rows)


if __name__ == "__main__":
    sys.exit(main())
