"""Reads as many examples for a model as a calibration wants, and those that are held out of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from upcycle.architectures.stock import build_config
from upcycle.errors import UsageError
from upcycle.inputs.examples import ExampleParts, InputExample, divided_examples, find_examples
from upcycle.inputs.reader import InputReader
from upcycle.models.image_states import image_states

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upcycle.recipe.recipe_parts import CalibrationRecipe

_LEAST = 4  # tokens of a text, or states of a sound: how many examples may be needed at most
_PER_IMAGE = 16  # tokens of an image in a text, at least: how many may be needed at most
_PLURAL = {"pairs": "pairs", "speech": "sounds", "sounds": "sounds"}


class FoundInputs(NamedTuple):
    """Holds what was found for a model.

    Attributes:
        reader: reads it.
        what: what ``main`` are, in the plural.
        main: the examples, of a model of two towers its images.
        texts: what the other tower reads; None: there is none.
    """

    reader: InputReader
    what: str
    main: ExampleParts
    texts: ExampleParts | None = None

    @property
    def sha256(self) -> list[str]:
        """The hashes of all that is calibrated on."""
        return [parts.sha256 for parts in (self.main, self.texts) if parts]

    @property
    def held_out(self) -> dict[str, str]:
        """What was held out, for ``upcycle.json``."""
        return {self.what: self.main.how, **({"texts": self.texts.how} if self.texts else {})}


@dataclass(frozen=True)
class BatchPlan:
    """Says which examples are read together, and how many tokens they have in all."""

    batches: list[tuple[list[InputExample], list[InputExample]]]
    tokens: int


def find_inputs(reads: str, wanted: CalibrationRecipe, path: Path, raw: Mapping[str, Any], limit: int) -> FoundInputs:
    """Find the examples that a recipe names for the model in ``path``, and divide them.

    Args:
        reads: what the model reads.
        wanted: sources, columns, and how many tokens.
        path: the model's folder.
        raw: its ``config.json``.
        limit: most tokens of a text.

    Raises:
        UsageError: a source holds nothing of the kind, or one of two kinds is missing.
        CheckpointError: processor and model do not fit.
        EnvironmentFault: a processor or dataset cannot be read.
    """
    config = build_config(raw, str(path))
    states = image_states(raw, str(path)) if reads in ("images", "images and text") else 1
    reader = InputReader(reads, config, path, min(wanted.window, limit), states)
    per_example = {
        "images": states,
        "images in text": _PER_IMAGE,
        "speech": int(getattr(config, "max_source_positions", 1)),
    }.get(reads, _LEAST)
    count = max(1, wanted.tokens // per_example)
    sources = max(1, len(wanted.texts))
    most = max(1, wanted.tokens // states)
    share, media = (-(-each * 8 // 7 // sources) + 1 for each in (count, most))  # with those that are held out
    found = find_examples(reads, wanted, share, media if reads == "images and text" else share)
    if reads != "images and text":
        return FoundInputs(
            reader, _PLURAL.get(reads, "images"), divided_examples(found, count, _PLURAL.get(reads, "images"))
        )
    images = [one for one in found if not isinstance(one.item, str)]
    texts = [InputExample(one.item) for one in found if isinstance(one.item, str)]
    texts += [InputExample(one.text) for one in images if one.text]
    for held, what, how in (
        (images, "images", "add a folder of images: --calibration FOLDER,captions.txt"),
        (
            texts,
            "texts",
            "add a file with a caption per line (--calibration FOLDER,captions.txt), or a .txt beside each image",
        ),
    ):
        if not held:
            raise UsageError(f"calibration: {', '.join(wanted.texts)}: this model reads images and text, and there are no {what}",
                             hint=how)  # fmt: skip
    return FoundInputs(
        reader,
        _PLURAL.get(reads, "images"),
        divided_examples(images, most, "images"),
        divided_examples(texts, count, "texts"),
    )


def planned_batches(found: FoundInputs, tokens: int, most: int, least: int) -> BatchPlan:
    """Return the examples to calibrate on in batches, those of one length together, until there are enough tokens.

    Args:
        found: the examples.
        tokens: how many are wanted.
        most: tokens of a batch.
        least: how many batches there are at least, where there are as many examples.
    """
    reader = found.reader
    main, total = _within(reader, found.main.read, tokens)
    count = len(main) if reader.alone else min(len(main), max(least, -(-total // most)))
    if found.texts is None:
        return BatchPlan([(group, []) for group in _grouped(reader, main, count)], total)
    texts, said = _within(reader, found.texts.read, tokens)
    count = min(count, len(texts))  # every batch has some of both
    pairs = zip(_grouped(reader, main, count), _grouped(reader, texts, count), strict=True)
    return BatchPlan(list(pairs), max(total, said))


def _within(reader: InputReader, examples: Sequence[InputExample], tokens: int) -> tuple[list[InputExample], int]:
    """Return the first examples that have so many tokens together, and how many they have."""
    taken, total = [], 0
    for one in examples:
        if total >= tokens:
            break
        taken.append(one)
        total += reader.tokens(one)
    return taken, total


def _grouped(reader: InputReader, examples: Sequence[InputExample], count: int) -> list[list[InputExample]]:
    """Return ``count`` groups of examples of about one length, in an order without a pattern: some groups are held out of fits."""
    ordered = sorted(examples, key=reader.length)
    cuts = [len(ordered) * i // count for i in range(count + 1)]
    groups = [list(ordered[a:b]) for a, b in itertools.pairwise(cuts)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [groups[i] for i in order]


def alike(reader: InputReader, examples: Sequence[InputExample], most: int) -> list[InputExample]:
    """Return at most ``most`` examples; where they differ in length, of the longer half, so that a cut to one length loses little."""
    ordered = sorted(examples, key=reader.length)
    if reader.length(ordered[0]) < reader.length(ordered[-1]):
        ordered = ordered[len(ordered) // 2 :]
    return ordered if len(ordered) <= most else [ordered[i * len(ordered) // most] for i in range(most)]
