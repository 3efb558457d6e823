"""Turns images into what a model reads, by the image processor that lies beside the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from upcycle.errors import CheckpointError
from upcycle.images.files import ImageItem

if TYPE_CHECKING:
    from pathlib import Path


class ImageReader:
    """Reads images as one model wants them.

    Args:
        processor: the model's stock image processor.
        config: its stock configuration, with the size and the number of channels of its images.
        where: its folder, for messages.
    """

    def __init__(self, processor: Any, config: Any, where: Path) -> None:
        size = config.image_size
        self._processor, self._where = processor, where
        self._shape = (config.num_channels, *((size, size) if isinstance(size, int) else size))

    def __call__(self, items: Sequence[ImageItem]) -> torch.Tensor:
        """Return fp32 pixels ``[N, C, H, W]``.

        Raises:
            UsageError: an image cannot be read; the message names it.
            CheckpointError: the processor makes other sizes than the model has.
        """
        import numpy as np

        arrays = [np.asarray(item.read(self._shape[0])) for item in items]
        arrays = [each[:, :, None] if each.ndim == 2 else each for each in arrays]
        made = self._processor(images=arrays, return_tensors="pt", input_data_format="channels_last")
        pixels: torch.Tensor = made["pixel_values"].float()
        if tuple(pixels.shape[1:]) != self._shape:
            raise CheckpointError(
                f"{self._where}: the image processor makes images of {list(pixels.shape[1:])}, and the model "
                f"reads {list(self._shape)}",
                hint="compare 'size' and 'crop_size' in preprocessor_config.json with 'image_size' in config.json",
            )
        return pixels


class ImageSet:
    """Images that are calibrated on, read when they are needed.

    Args:
        items: the images.
        reader: reads them.
        sha256: the hash of all of them.
        about: what is recorded of them.
    """

    def __init__(self, items: Sequence[ImageItem], reader: ImageReader, sha256: str, about: dict[str, Any]) -> None:
        self.items, self._reader, self.sha256, self.about = list(items), reader, sha256, about

    def pixels(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return fp32 pixels ``[n, C, H, W]`` of the images with these numbers ``[n]``."""
        return self._reader([self.items[int(number)] for number in numbers])
