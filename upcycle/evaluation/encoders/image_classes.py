"""Accuracy of image classifiers on a folder with a subfolder per class, and their agreement with the dense parent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from upcycle.errors import UsageError
from upcycle.images.files import ImageItem, class_of
from upcycle.models.model_inputs import states_model

if TYPE_CHECKING:
    from upcycle.images.pixels import ImageReader
    from upcycle.progress import Progress

_BATCH = 16
_HINT = "a subfolder per class, named as in 'id2label' of config.json or by the class's number"


@dataclass(frozen=True)
class ClassResult:
    """Holds top-1 accuracies on images.

    Attributes:
        images: how many.
        classes: how many classes they are of.
        accuracy: the share of images whose class the model finds.
        reference_accuracy: the same of the reference; None: there is none.
        agreement: the share of images that both put into one class, right or wrong; None: there is no reference.
    """

    images: int
    classes: int
    accuracy: float
    reference_accuracy: float | None = None
    agreement: float | None = None


def labels_of(items: Sequence[ImageItem], config: Any, where: str) -> torch.Tensor:
    """Return the class ``[N]`` of every image, by the name of its subfolder.

    Raises:
        UsageError: an image lies in no subfolder, or no class of the model is named like one.
    """
    known = {str(name): int(index) for index, name in config.id2label.items()}
    known |= {str(index): int(index) for index in config.id2label if str(index) not in known}
    found = []
    for item in items:
        name = class_of(item)
        if name not in known:
            some = ", ".join(list(known)[:4])
            what = f"folder '{name}' is no class of the model" if name else f"{item.name} is in no class's folder"
            raise UsageError(f"{where}: {what} (its classes: {some}, ...)", hint=_HINT)
        found.append(known[name])
    return torch.tensor(found)


def predictions(model: Any, items: Sequence[ImageItem], reader: ImageReader, progress: Progress) -> torch.Tensor:
    """Return the most likely class ``[N]`` of every image."""
    found = []
    with progress.phase("classifying images", len(items)), torch.no_grad():
        for start in range(0, len(items), _BATCH):
            some = items[start : start + _BATCH]
            found.append(model(pixel_values=reader(some)).logits.argmax(-1))
            progress.advance(len(some))
    return torch.cat(found)


def image_vectors(model: Any, items: Sequence[ImageItem], reader: ImageReader, progress: Progress) -> torch.Tensor:
    """Return unit vectors ``[N, d]``: the mean of all states of each image."""
    found = []
    with progress.phase("embedding images", len(items)), torch.no_grad():
        for start in range(0, len(items), _BATCH):
            some = items[start : start + _BATCH]
            states = states_model(model)(pixel_values=reader(some)).last_hidden_state
            found.append(states.mean((2, 3)) if states.dim() == 4 else states.mean(1))
            progress.advance(len(some))
    return torch.nn.functional.normalize(torch.cat(found).double(), dim=-1)


def judged(found: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor | None) -> ClassResult:
    """Compare predictions ``[N]`` with the classes ``[N]``, and with another model's predictions."""
    return ClassResult(
        images=len(labels),
        classes=len(labels.unique()),
        accuracy=(found == labels).double().mean().item(),
        reference_accuracy=None if reference is None else (reference == labels).double().mean().item(),
        agreement=None if reference is None else (reference == found).double().mean().item(),
    )
