"""Images in conversations, as a model of parts reads them by its own stock processor, while it trains.

Before a run only the headers of image files are read: an image's size says which tokens stand for it. Its pixels are read when its row
comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from upcycle.architectures.clean_settings import CONFIG, PROCESSORS, clean_file
from upcycle.architectures.module_paths import text_config
from upcycle.architectures.stock import build_config, load_processor, quiet_transformers
from upcycle.errors import EnvironmentFault, UpcycleError, UsageError
from upcycle.files.formats.settings import base_type
from upcycle.images.files import ImageItem
from upcycle.registry import find

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMAT = "2"  # part of every key of tokenised examples with images
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # of EXIF: stored lying
_SHOWN = 3  # images that are named in an error
_SIZES = 256  # of images, whose ids are remembered: a large image has thousands
_PILLOW = "pip install pillow"  # a hint
# What a processor makes of texts, which rows have already.
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


class Picture(NamedTuple):
    """An image file, and its size in pixels as it was when the data were checked."""

    path: str
    width: int
    height: int


class PictureError(ValueError):
    """An image that cannot be read; the message names it and says why. ``path`` is its file, where one was looked for."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class Pictures:
    """What one model reads of images.

    Args:
        folder: the model's, with its processor.
        config: its stock configuration.

    Attributes:
        whole_rows: whether its class takes no positions that restart within a row, so that every example needs a row for itself.
        bad: images that could not be read since this was made, by message.
        most_bad: how many such images there may be.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        self._folder, self._config = folder, config
        wrapper = find("wrapper", base_type(config))
        self.typed: str | None = wrapper.typed if wrapper else None
        text = text_config(config)
        self.whole_rows = self.typed is not None or "mrope" in str(getattr(text, "rope_parameters", None))
        self._ids = lru_cache(_SIZES)(self._ids_of_size)
        self.bad: list[str] = []
        self.most_bad = 0
        self._told = 0
        self._lost: set[str] = set()

    @cached_property
    def processor(self) -> Any:
        """The stock processor.

        Raises:
            EnvironmentFault: there is none, or Pillow is missing.
        """
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise EnvironmentFault("images are read by Pillow, which is not installed", hint=_PILLOW) from None
        found = load_processor(self._folder)
        if not hasattr(found, "image_processor") or not isinstance(getattr(found, "image_token", None), str):
            raise EnvironmentFault(
                f"{self._folder} has no processor of images, by which a model of parts reads conversations with images",
                hint="copy processor_config.json and preprocessor_config.json beside the weights, from the original model",
            )
        return found

    @property
    def token(self) -> str:
        """What stands for an image in a text."""
        return str(self.processor.image_token)

    @cached_property
    def token_id(self) -> int:
        """Its id, of which the processor makes as many as an image has states.

        Raises:
            UsageError: the tokenizer divides it.
        """
        ids = self.processor.tokenizer(self.token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise UsageError(
                f"{self._folder}: the tokenizer has no single token for {self.token}, and makes {ids} of it",
                hint="add it to the tokenizer as a special token: tokenizer.add_special_tokens, then save_pretrained",
            )
        return int(ids[0])

    @cached_property
    def fingerprint(self) -> str:
        """A text that differs wherever the processor makes other tokens of images."""
        files = [(name, (self._folder / name).read_bytes()) for name in PROCESSORS if (self._folder / name).is_file()]
        return hashlib.sha256(repr((_FORMAT, type(self.processor).__name__, files)).encode()).hexdigest()[:16]

    def look(self, path: Path) -> Picture:
        """Return an image with its size, by its header.

        Raises:
            PictureError: it is no image, or is not there.
        """
        from PIL import Image

        try:
            with Image.open(path) as image:
                width, height = image.size
                turned = image.getexif().get(_ORIENTATION) in _TURNED
        except Exception as error:  # damaged files raise errors of many kinds
            raise PictureError(f"the image {path} cannot be read: {_first_line(error, path)}", path) from None
        return Picture(str(path), height, width) if turned else Picture(str(path), width, height)

    def as_they_were(self, pictures: Iterable[Picture], lost: Iterable[str], since: int) -> bool:
        """Return whether images are there with the sizes by which rows were tokenised, and those that could not be read still cannot.

        Files that are no images any more have the same tokens, and count as they were.

        Args:
            pictures: that were read.
            lost: names of files that could not be.
            since: when that was, in nanoseconds; only files that changed later are opened.
        """
        return not any(self._looked(Path(path)) for path in lost) and all(
            (changed := _changed(Path(picture.path))) is not None
            and (changed <= since or self._looked(Path(picture.path)) in (None, picture))
            for picture in pictures
        )

    def _looked(self, path: Path) -> Picture | None:
        try:
            return self.look(path)
        except PictureError:
            return None

    def ids(self, picture: Picture) -> list[int]:
        """Return the ids that the processor puts in the place of an image's token."""
        return self._ids(picture.width, picture.height)

    def _ids_of_size(self, width: int, height: int) -> list[int]:
        return self.ids_of(self.token, [Picture("", width, height)])

    def ids_of(self, text: str, pictures: Sequence[Picture]) -> list[int]:
        """Return the processor's own ids of a text with images of these sizes, to compare with."""
        ids: list[int] = self._processed(text, list(map(self._blank, pictures)))["input_ids"][0].tolist()
        return ids

    def media(self, pictures: Sequence[Picture]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Return what the model reads of images beside their tokens, by argument, and which of them could not be read.

        In the place of the latter is a black image.

        Raises:
            UsageError: there were too many of them; the message names the last.
        """
        images, lost = [], []
        for place, picture in enumerate(pictures):
            try:
                images.append(self._read(picture))
            except PictureError as error:
                lost.append(place)
                images.append(self._blank(picture))
                if picture.path not in self._lost:
                    self._lost.add(picture.path)
                    self.bad.append(str(error))
                    self._check_bad()
        made = self._processed(self.token * len(images), images)
        tensors = {
            name: value for name, value in made.items() if isinstance(value, torch.Tensor) and name not in _OF_TEXT
        }
        return tensors, lost

    def types(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what tells the model which of ``ids`` ``[B, L]`` are images, where it must be told."""
        return {self.typed: (ids == self._config.image_token_id).long()} if self.typed else {}

    def news(self) -> list[str]:
        """Return a sentence for every image that could not be read since the last call."""
        new, self._told = self.bad[self._told :], len(self.bad)
        return [f"{each}; its example is not learned from ({len(self.bad)} of at most {self.most_bad})" for each in new]

    def _check_bad(self) -> None:
        if len(self.bad) <= self.most_bad:
            return
        raise UsageError(
            f"{self.bad[-1]}; it is number {len(self.bad):,} in this run, and data.bad_images is {self.most_bad}",
            hint="put it back or mend it, then run the same command again to continue; or raise data.bad_images",
        )

    @property
    def _channels(self) -> int:
        return int(getattr(getattr(self._config, "vision_config", None), "num_channels", 3) or 3)

    def _blank(self, picture: Picture) -> Image:
        from PIL import Image

        return Image.new("L" if self._channels == 1 else "RGB", (picture.width, picture.height))

    def _read(self, picture: Picture) -> Image:
        try:
            image = ImageItem(picture.path, Path(picture.path)).read(self._channels)
        except UpcycleError as error:
            raise PictureError(error.message) from None
        if image.size != (picture.width, picture.height):
            raise PictureError(
                f"the image {picture.path} has {image.size[0]} x {image.size[1]} pixels, and had {picture.width} x "
                f"{picture.height} when the data were checked"
            )
        return image

    def _processed(self, text: str, images: list[Image]) -> Mapping[str, Any]:
        try:
            with quiet_transformers():
                made: Mapping[str, Any] = self.processor(
                    text=[text], images=images, return_tensors="pt", add_special_tokens=False
                )
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError) as error:
            sizes = ", ".join(f"{image.size[0]} x {image.size[1]}" for image in images[:_SHOWN])
            raise UsageError(
                f"{self._folder}: the processor ({type(self.processor).__name__}) cannot read images of {sizes} pixels: "
                f"{_first_line(error)}",
                hint="compare processor_config.json and preprocessor_config.json with the original model's",
            ) from None
        return made


def pictures_of(folder: Path) -> Pictures | None:
    """Return what the model in a folder reads of images; None: it reads none. Its processor is loaded when it is needed."""
    raw = clean_file(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if not raw:
        return None
    config = build_config(raw, str(folder))
    wrapper = find("wrapper", base_type(config))
    return Pictures(folder, config) if wrapper is not None and wrapper.kind == "image" else None


def _changed(path: Path) -> int | None:
    """Return when a file was put there or changed, in nanoseconds, or None where it is gone.

    Copying may keep the time of its content, but not this one.
    """
    try:
        return path.stat().st_ctime_ns
    except OSError:
        return None


def _first_line(error: Exception, path: Path | None = None) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = (said.strip().splitlines() or [type(error).__name__])[0]
    return "it is no image that Pillow can read" if path is not None and "cannot identify" in first else first
