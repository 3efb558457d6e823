"""Finds image files in folders, and reads them in the mode that a model wants."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg")
_MODES = {1: "L", 3: "RGB"}  # by the model's number of channels
_PILLOW = "pip install pillow"  # a hint


@dataclass(frozen=True)
class ImageItem:
    """An image that is read when it is wanted.

    Attributes:
        name: its path below its folder, or its place in a dataset, for messages.
        path: its file; None: it is in memory.
        held: the image, where it is in memory.
    """

    name: str
    path: Path | None = None
    held: Any = None

    @cached_property
    def sha256(self) -> str:
        """The hash of the file, or of the pixels where there is none."""
        content = self.held.tobytes() if self.path is None else self._bytes()
        return hashlib.sha256(content).hexdigest()

    def _bytes(self) -> bytes:
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UsageError(f"{self.path}: the image cannot be read: {error.strerror}") from None

    def read(self, channels: int) -> Image:
        """Return the image turned upright, in the mode that the number of channels stands for.

        Raises:
            UsageError: it is no image, or is damaged; the message names the file.
            EnvironmentFault: Pillow is missing.
        """
        try:
            from PIL import Image, ImageOps
        except ImportError:
            raise EnvironmentFault("images are read by Pillow, which is not installed", hint=_PILLOW) from None
        try:
            opened = self.held if self.path is None else Image.open(self.path)
            return ImageOps.exif_transpose(opened).convert(_MODES.get(channels, "RGB"))
        except Exception as error:  # damaged files raise errors of many kinds
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"{self.path or self.name}: the image cannot be read: {first}", hint="remove the file, or replace it"
            ) from None


def image_files(folder: Path) -> list[ImageItem]:
    """Return all images in a folder and in those below it, in the order of their names.

    Raises:
        UsageError: it is no folder, or there are none.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is no folder, and this model reads images",
            hint="name a folder of .png or .jpg files",
        )
    found = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not found:
        raise UsageError(
            f"{folder} has no images: no {', '.join(SUFFIXES)} in it or in the folders below it",
            hint="name a folder of .png or .jpg files",
        )
    return [ImageItem(path.relative_to(folder).as_posix(), path) for path in found]


def class_of(item: ImageItem) -> str:
    """Return the name of the subfolder that an image is in; empty where it is in none."""
    return item.name.partition("/")[0] if "/" in item.name else ""


def spread(items: Sequence[ImageItem], count: int) -> list[ImageItem]:
    """Return at most ``count`` of some images, evenly spread over all."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
