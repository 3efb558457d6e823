"""The interface of a planned conversion of any kind, before a weight is read, and the steps that all kinds share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from upcycle.architectures.dense.base import Family
from upcycle.checkpoints.output_layout import Shard, Unit
from upcycle.errors import RefusalError, UsageError
from upcycle.methods.base import AnyMethod
from upcycle.planning.cost import Plan
from upcycle.recipe.conversion_recipe import Recipe
from upcycle.recipe.validated import validated
from upcycle.registry import load

CALIBRATION_HINT = "--calibration demo, a text file, a hub dataset, or self"


class PlannedJob(Protocol):
    """Describes a validated conversion: its parts, its shapes, and every tensor of the output with its file.

    :class:`upcycle.conversion.job.ConversionJob`, in a room above this one, adds how it is carried out.
    """

    @property
    def recipe(self) -> Recipe:
        """The recipe with the numbers that follow from method and model filled in."""

    @property
    def method(self) -> AnyMethod:
        """The recipe's method with its parameters, looked up once."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The weight files to write."""

    @property
    def units(self) -> Iterator[Unit]:
        """All units of all shards, in the order in which they are written."""

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is read."""

    @property
    def undecided(self) -> bool:
        """Whether the method still has to find its coefficients from weights and text, before anything is written."""

    @property
    def promise(self) -> tuple[str, str]:
        """The promise, ``exact``, ``rounded`` or ``approximate``, and the reason for it."""

    @property
    def family_name(self) -> str:
        """The architecture of the source."""

    @property
    def context(self) -> int:
        """The longest input in tokens."""

    @property
    def vocab_size(self) -> int:
        """The vocabulary size of the source and the result."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of the result's ``config.json``."""

    @property
    def recipe_text(self) -> str:
        """The resolved recipe as YAML."""

    @property
    def record(self) -> dict[str, Any]:
        """The keys that only this kind of conversion adds to ``upcycle.json``."""

    @property
    def working_bytes(self) -> int:
        """Bytes that the working folder needs in addition to the output."""

    def cost(self) -> Plan:
        """Work out what the conversion will write and need, from headers alone."""


def method_of(recipe: Recipe) -> AnyMethod:
    """Return the method that a recipe names, with its parameters.

    Raises:
        UsageError: there is no such method, or a parameter is wrong.
    """
    cls = load("method", recipe.method)
    method: AnyMethod = cls(validated(cls.Parameters, recipe.parameters, "parameters"))
    return method


def check_tokenizer(recipe: Recipe, has_tokenizer: bool) -> None:
    """Refuse a recipe that copies the tokenizer of a source without one.

    Raises:
        UsageError: the recipe copies the tokenizer, and there is none beside the weights.
    """
    if recipe.tokenizer == "copy" and not has_tokenizer:
        is_gguf, files = (
            recipe.source.endswith(".gguf"),
            "tokenizer.json, tokenizer.model, vocab.json, vocab.txt, tekken.json",
        )
        looked = "metadata keys tokenizer.ggml.model and tokenizer.ggml.tokens" if is_gguf else files
        raise UsageError(
            f"{recipe.source} has no tokenizer (looked for {looked})",
            hint="put the tokenizer's files beside the weights, or go without: --tokenizer none",
        )


def check_text(recipe: Recipe, what: str) -> None:
    """Refuse a recipe without calibration text.

    Args:
        recipe: the recipe.
        what: what looks at the text, for the message.

    Raises:
        UsageError: the recipe names no text.
    """
    if not recipe.calibration.texts:
        raise UsageError(f"{what} looks at activations and needs calibration text", hint=CALIBRATION_HINT)


def check_columns(recipe: Recipe, family: Family) -> None:
    """Refuse a column for a second text where the model reads none.

    Raises:
        UsageError: the model reads one text, image or sound.
    """
    reads = family.calibrates_on or family.reads
    if recipe.calibration.target is not None and reads in ("text", "images", "sounds"):
        raise UsageError(
            f"calibration.target names a second text, and a {family.name} model reads {reads} alone",
            hint="leave calibration.target out",
        )


def check_calibrates(family: Family, by_loss: str | None = None) -> None:
    """Refuse to calibrate a model of a family that cannot be calibrated.

    Args:
        family: the architecture.
        by_loss: what measures the loss of the next token on the way; None: nothing does.

    Raises:
        RefusalError: it cannot; the message says why.
    """
    if by_loss and family.pauses and not family.encoder:
        raise RefusalError(
            f"{by_loss} runs the layers of a decoder one by one, and those of a {family.name} model are no single row",
            hint="a method that looks at activations, such as coactivation_kmeans",
        )
    if by_loss and family.encoder:
        raise RefusalError(
            f"{by_loss} goes by the loss of the next token, and a {family.name} model is an encoder, which predicts none",
            hint="a method that looks at activations, such as coactivation_kmeans; measure the results with upcycle evaluate",
        )
    if family.uncalibrated:
        raise RefusalError(
            f"a {family.name} model cannot be calibrated: {family.uncalibrated}",
            hint="leave the calibration text out, and choose a method and a router that need none",
        )
