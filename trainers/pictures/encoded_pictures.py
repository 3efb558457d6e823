"""Puts the ids of images into the ids of an example, where its text has their marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from upcycle.errors import UsageError
from upcycle.text.reading.conversations import Example
from upcycle.text.reading.images_in_rows import flat
from upcycle.trainers.pictures.pictures import Picture, PictureError, Pictures


class PictureIds:
    """Writes images into examples.

    Args:
        pictures: what the model reads of images.
        template: what writes conversations; None: prompts and responses are put together as they stand.
    """

    def __init__(self, pictures: Pictures, template: Any) -> None:
        self._pictures = pictures
        self._parts = template is not None and template.takes_images(pictures.token)
        self._compared = False

    def written(self, examples: Sequence[Example]) -> list[Example]:
        """Return examples whose messages a template takes: with images as parts, where it knows them, or as marks in the text."""
        if self._parts:
            return list(examples)
        token = self._pictures.token
        return [
            replace(
                example,
                messages=tuple(
                    {**m, "content": flat(m["content"], token)} if "content" in m else m for m in example.messages
                ),
            )
            if example.images
            else example
            for example in examples
        ]

    def placed(
        self, example: Example, text: str, ids: list[int], learned: list[bool]
    ) -> tuple[list[int], list[bool], tuple[Picture, ...]]:
        """Return ids and what is learned ``[T]`` of an example with its images, and these.

        Args:
            example: names its images.
            text: what was tokenised.
            ids: with one id for each image.
            learned: which of them are learned.

        Raises:
            PictureError: an image cannot be read, or the text has more or fewer marks than there are images.
            UsageError: the stock processor makes other ids of the same text.
        """
        token = self._pictures.token_id
        marks = ids.count(token)
        if marks != len(example.images):
            raise PictureError(
                f"{len(example.images)} images, and {marks} marks ({self._pictures.token}) in what the template writes"
                + (
                    "; images are named in columns (image, images) or in parts of messages"
                    if not example.images
                    else ""
                )
            )
        if not marks:
            return ids, learned, ()
        pictures = tuple(self._pictures.look(Path(example.folder) / name) for name in example.images)
        coming = iter(pictures)
        made: list[int] = []
        counts: list[bool] = []
        for one, is_learned in zip(ids, learned, strict=True):
            some = self._pictures.ids(next(coming)) if one == token else [one]
            made += some
            counts += [is_learned and one != token] * len(some)
        self._compare(text, made, pictures)
        return made, counts, pictures

    def _compare(self, text: str, ids: list[int], pictures: Sequence[Picture]) -> None:
        """Compare the first example with what the stock processor makes of the whole text at once."""
        if self._compared:
            return
        self._compared = True
        own = self._pictures.ids_of(text, pictures)
        at = next((i for i in range(len(ids) - len(own) + 1) if ids[i : i + len(own)] == own), None)
        if at is None:  # a begin-of-text token may be before it, an end-of-text token behind
            raise UsageError(
                f"the stock processor makes other tokens of {text[:60]!r} with its images than of text and images apart",
                hint="this processor is not known here: train with transformers' Trainer",
            )
