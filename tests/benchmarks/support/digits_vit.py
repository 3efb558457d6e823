"""A small vision transformer, trained on scikit-learn's handwritten digits; made on first use, and then kept.

1,797 images of 8 x 8 pixels (Alpaydin and Kaynak, UCI); every fifth is held out. As a program it prints the
folder and its accuracy on those.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]

import torch
from smollm2 import cache_folder
from torch.nn.functional import cross_entropy

SIZES = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.1,
    "num_labels": 10,
}
EPOCHS, BATCH, RATE = 40, 64, 2e-3


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Images ``[N, 1, 8, 8]`` from -1 to 1 with their labels ``[N]``: those to train on, and those that are held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    held = torch.arange(len(labels)) % 5 == 0
    return (images[~held], labels[~held]), (images[held], labels[held])


def accuracy(model: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images whose label is the most likely one."""
    with torch.no_grad():
        found = model.eval()(pixel_values=images).logits.argmax(-1)
    return (found == labels).double().mean().item()


def train(folder: Path) -> None:
    """Train the model, and save it."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model: Any = ViTForImageClassification(ViTConfig(**SIZES)).train()
    (images, labels), _ = digits()
    steps = EPOCHS * (len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(EPOCHS):
        for some in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].split(BATCH):
            loss = cross_entropy(model(pixel_values=images[some]).logits, labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().save_pretrained(folder)


def digits_vit() -> Path:
    """The folder of the trained model."""
    folder = cache_folder() / "digits-vit"
    if not (folder / "config.json").exists():
        train(folder)
    return folder


if __name__ == "__main__":
    from transformers import ViTForImageClassification

    place = digits_vit()
    _, held = digits()
    print(place)
    print(f"accuracy {accuracy(ViTForImageClassification.from_pretrained(place), *held):.2%} of {len(held[1])} images")
