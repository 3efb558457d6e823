"""What models of two inputs, or of sounds, are calibrated on: pairs of texts, sounds with what is said, images and captions.

They come from files of rows, folders and hub datasets, and are divided into those to calibrate on and those to measure on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from upcycle.errors import UsageError
from upcycle.files.user_paths import user_path
from upcycle.images.files import SUFFIXES as IMAGE_SUFFIXES
from upcycle.images.files import ImageItem, evenly_spread, image_files
from upcycle.inputs.sounds import SoundItem, held_sound, sound_files
from upcycle.text.held_out import HELD_OUT_DOCUMENTS
from upcycle.text.hub_dataset import hub_rows, is_dataset
from upcycle.text.reading.columns import Reading
from upcycle.text.reading.conversations import Broken
from upcycle.text.reading.documents import find_pieces
from upcycle.text.reading.file_kinds import file_kind
from upcycle.text.reading.plain_text import read_text

if TYPE_CHECKING:
    from upcycle.recipe.recipe_parts import CalibrationRecipe

_WHOLE = 1 << 62  # bytes; a piece of this size is the whole file
# Columns of datasets.
_MEDIA = {
    "speech": "audio",
    "sounds": "audio",
    "images": "image",
    "images and text": "image",
    "images in text": "image",
}
_TARGETS = {"speech": "text", "images and text": "text", "images in text": "text"}
_COLUMN = "name the column: calibration.column, calibration.target (of evaluate: --column, --target)"  # a hint

Item = str | ImageItem | SoundItem


class InputExample(NamedTuple):
    """Holds what a model reads at once: a text, image or sound, and the text that goes with it, if one does."""

    item: Item
    text: str | None = None

    @property
    def number(self) -> int:
        """A number that depends on the content of ``item`` alone."""
        if isinstance(self.item, str):
            return int.from_bytes(hashlib.sha256(self.item.encode("utf-8", "surrogatepass")).digest()[:6], "big")
        return int(self.item.sha256[:12], 16)


class ExampleParts(NamedTuple):
    """Holds the examples that are calibrated on (``read``), those that are not, and a description of the latter."""

    read: list[InputExample]
    held_out: list[InputExample]
    how: str

    @property
    def sha256(self) -> str:
        """The hash of all that is calibrated on."""
        numbers = [f"{one.number:x} {one.text}" for one in self.read]
        return hashlib.sha256("\n".join(numbers).encode("utf-8", "surrogatepass")).hexdigest()


def divided_examples(examples: Sequence[InputExample], count: int, what: str) -> ExampleParts:
    """Hold out about one example in eight, decided by its content alone, so that copies of one are on the same side.

    Args:
        examples: in the order in which they are wanted.
        count: how many are calibrated on at most.
        what: what they are, in the plural.

    Raises:
        UsageError: there are fewer than two.
    """
    held = [one for one in examples if one.number % HELD_OUT_DOCUMENTS == 0]
    read = [one for one in examples if one.number % HELD_OUT_DOCUMENTS]
    if not read or not held:
        read, held = list(examples[:-1]), list(examples[-1:])
    if not read:
        raise UsageError(
            f"calibration: {len(examples)} {what} are too few to calibrate on and to measure on",
            hint="name a source with more of them",
        )
    return ExampleParts(read[:count], held, f"{len(held):,} of {len(examples):,} {what}")


def find_examples(reads: str, wanted: CalibrationRecipe, most: int, media: int | None = None) -> list[InputExample]:
    """Return up to ``most`` examples of every source that a recipe names, mixed evenly.

    Args:
        reads: what the model reads, see :data:`~upcycle.architectures.described.ffn_place.Reads`.
        wanted: its ``texts`` are the sources: files of rows, folders of images or sounds (with a text of the same name and
            the ending .txt beside each), texts with a caption per line, or hub datasets.
        most: of each source.
        media: of each folder, if not ``most``.

    Raises:
        UsageError: a source has nothing of this kind, or lacks a column.
        EnvironmentFault: a dataset cannot be read.
    """
    found = [list(islice(_of(name, reads, wanted, media or most), most)) for name in wanted.texts]
    return [one for row in zip_longest(*found) for one in row if one is not None]


def _of(name: str, reads: str, wanted: CalibrationRecipe, most: int) -> Iterator[InputExample]:
    path = user_path(name)
    if path.is_dir():
        yield from _in_folder(path, reads, most)
    elif path.is_file() and reads == "pairs":
        yield from _pairs(path, wanted)
    elif path.is_file() and reads == "images and text":
        yield from _captions(path, wanted)
    elif not path.exists() and is_dataset(name) and name != "self":
        for number, row in enumerate(hub_rows(name)):
            yield _from_row(row, reads, wanted, f"{name}, row {number}")
    else:
        kinds = {
            "pairs": "a file of rows (.jsonl, .json, .csv, .parquet)",
            "images and text": "a folder or a text file",
        }
        what = "is no source" if path.exists() or not path.suffix else "does not exist, so it is no source"
        raise UsageError(
            f"{name} {what} for a model that reads {reads}",
            hint=f"name {kinds.get(reads, 'a folder')}, or a hub dataset (org/name[:config[:split]])",
        )


def _in_folder(folder: Path, reads: str, most: int) -> Iterator[InputExample]:
    if reads == "pairs":
        raise UsageError(
            f"{folder} is a folder, and this model reads pairs of texts",
            hint="name files of rows: .jsonl, .json, .csv or .parquet",
        )
    if reads in ("images", "images and text", "images in text"):
        for image in evenly_spread(image_files(folder), most):
            assert image.path is not None
            yield InputExample(image, _beside(image.path))
        return
    for sound in _spread(sound_files(folder), most):
        assert sound.path is not None
        text = _beside(sound.path)
        if reads == "speech" and text is None:
            raise UsageError(
                f"{sound.path}: there is no {sound.path.with_suffix('.txt').name} with what is said in it, which the decoder reads",
                hint="put a text file of the same name beside every sound",
            )
        yield InputExample(sound, text)


def _spread(items: list[SoundItem], count: int) -> list[SoundItem]:
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def _beside(path: Path) -> str | None:
    """Return the text in the file of the same name with the ending .txt; None where there is none, or it is empty."""
    beside = path.with_suffix(".txt")
    return (read_text(str(beside)).strip() or None) if beside.is_file() else None


def _pairs(path: Path, wanted: CalibrationRecipe) -> Iterator[InputExample]:
    """Yield the pairs of a file of rows; both columns are read in step, whatever the format."""
    if file_kind(path) == "text":
        raise UsageError(
            f"{path} is plain text and has no column '{wanted.target}'",
            hint="name a file of rows (.jsonl, .json, .csv, .parquet), or leave calibration.target out: then encoder and "
            "decoder read the same text",
        )
    for piece in find_pieces([str(path)], _WHOLE):
        columns = (piece.records(Reading(column)) for column in (wanted.column, wanted.target))
        for pair in zip(*columns, strict=True):
            for found in pair:
                if isinstance(found, Broken):
                    raise UsageError(found.message, hint=_COLUMN)
            source, target = map(str, pair)
            if source.strip() and target.strip():
                yield InputExample(source, target)


def _captions(path: Path, wanted: CalibrationRecipe) -> Iterator[InputExample]:
    """Yield the lines of a text, or the rows of a file of rows: of both, those that are not empty."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise UsageError(f"{path} is one image", hint="name its folder")
    if file_kind(path) == "text":
        yield from (InputExample(line.strip()) for line in read_text(str(path)).splitlines() if line.strip())
        return
    for piece in find_pieces([str(path)], _WHOLE):
        for row in piece.records(Reading(wanted.column)):
            if isinstance(row, Broken):
                raise UsageError(row.message, hint=_COLUMN)
            if not isinstance(row, str):
                raise UsageError(f"{path}: column '{wanted.column}' holds conversations, not captions", hint=_COLUMN)
            if row.strip():
                yield InputExample(row.strip())


def _from_row(row: Any, reads: str, wanted: CalibrationRecipe, where: str) -> InputExample:
    column = _MEDIA.get(reads, wanted.column) if wanted.column == "text" else wanted.column
    target = wanted.target or _TARGETS.get(reads)
    text = None if target is None else _value(row, target, where)
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{where}: column '{target}' holds {type(text).__name__}, not text", hint=_COLUMN)
    found = _value(row, column, where)
    if reads in ("speech", "sounds"):
        sound = held_sound(found)
        item: Item | None = None if sound is None else SoundItem(where, held=sound)
    elif reads == "pairs":
        item = found if isinstance(found, str) else None
    else:
        item = ImageItem(where, held=found) if hasattr(found, "convert") and hasattr(found, "tobytes") else None
    if item is None:
        raise UsageError(
            f"{where}: column '{column}' holds {type(found).__name__}, not what the model reads", hint=_COLUMN
        )
    return InputExample(item, text)


def _value(row: Any, column: str, where: str) -> Any:
    if not isinstance(row, dict) or column not in row:
        columns = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise UsageError(f"{where}: there is no column '{column}'; the columns are {columns}", hint=_COLUMN)
    return row[column]
