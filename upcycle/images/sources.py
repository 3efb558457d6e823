"""The images of a calibration: folders and hub datasets, divided into those to calibrate on and those to measure on."""

from __future__ import annotations

import hashlib
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from upcycle.errors import UsageError
from upcycle.files.user_paths import user_path
from upcycle.images.files import ImageItem, image_files, spread
from upcycle.text.held_out import HELD_OUT_DOCUMENTS
from upcycle.text.hub_dataset import hub_rows, is_dataset

if TYPE_CHECKING:
    from upcycle.recipe.recipe_parts import CalibrationRecipe

_COLUMN = "image"  # of a dataset, where the recipe leaves the column as it is for texts


class ImageParts(NamedTuple):
    """Holds the images that are calibrated on (``read``), those that are not, and a description of the latter."""

    read: list[ImageItem]
    held_out: list[ImageItem]
    how: str

    @property
    def sha256(self) -> str:
        """The hash of all images that are calibrated on."""
        return hashlib.sha256("".join(item.sha256 for item in self.read).encode()).hexdigest()


def read_images(wanted: CalibrationRecipe, count: int) -> ImageParts:
    """Find ``count`` images to calibrate on, mixed evenly from all sources, and about one for every seven to measure on.

    Which ones are held out is decided by their hashes, so that copies of an image are on the same side.

    Args:
        wanted: its ``texts`` are folders of images, or hub datasets whose ``column`` holds images.
        count: the number of images; there may be fewer.

    Raises:
        UsageError: a source has no images, or there is only one image in all.
        EnvironmentFault: a dataset cannot be read.
    """
    share = -(-count * HELD_OUT_DOCUMENTS // (HELD_OUT_DOCUMENTS - 1) // len(wanted.texts)) + 1
    mixed = [i for row in zip_longest(*(_items(name, wanted, share) for name in wanted.texts)) for i in row if i]
    hashed = [(int(item.sha256[:12], 16) % HELD_OUT_DOCUMENTS == 0, item) for item in mixed]
    read, held = ([item for out, item in hashed if out is side] for side in (False, True))
    if not read or not held:
        read, held = mixed[:-1], mixed[-1:]
    if not read:
        raise UsageError(
            f"calibration: {', '.join(wanted.texts)}: one image is too few to calibrate on and to measure on",
            hint="name a folder with more images",
        )
    return ImageParts(read[:count], held, f"{len(held):,} of {len(mixed):,} images")


def _items(name: str, wanted: CalibrationRecipe, count: int) -> list[ImageItem]:
    path = user_path(name)
    if path.exists():
        return spread(image_files(path), count)
    if name == "self" or not is_dataset(name):
        raise UsageError(
            f"calibration: there is no folder {name}, and this model reads images",
            hint="--calibration FOLDER, with .png or .jpg files, or a hub dataset (org/name[:config[:split]])",
        )
    column = _COLUMN if wanted.column == "text" else wanted.column
    rows = islice(hub_rows(name), count)
    return [ImageItem(f"{name}, row {i}", held=_image(row, column, name)) for i, row in enumerate(rows)]


def _image(row: Any, column: str, name: str) -> Any:
    found = row.get(column) if isinstance(row, dict) else None
    if not hasattr(found, "tobytes") or not hasattr(found, "convert"):
        columns = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise UsageError(
            f"{name}: no image in column '{column}'; the columns are {columns}", hint="--set calibration.column=NAME"
        )
    return found
