"""The interface between a conversion and its job, whatever kind of model the job makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from upcycle.errors import UsageError
from upcycle.files.names import WRITTEN
from upcycle.planning.job import PlannedJob

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from upcycle.calibration.own_text import OwnText
    from upcycle.calibration.read_inputs import InputSet
    from upcycle.checkpoints.checkpoint import Checkpoint
    from upcycle.checkpoints.output_layout import OutputEntry, Unit
    from upcycle.ffn.source_samples import Samples
    from upcycle.images.pixels import ImageSet
    from upcycle.methods.base import AnyMethod
    from upcycle.planning.verification_text import MeasuredText
    from upcycle.progress import Progress
    from upcycle.recipe.conversion_recipe import Recipe
    from upcycle.verification.verdict import Verification


@dataclass(frozen=True)
class TokensRead:
    """Holds the token ids that decide a conversion.

    Attributes:
        windows: the calibration text's, int64 ``[N, W]``; of images, their numbers. None: nothing is read.
        samples: those that tell several sources apart; None: nothing needs them.
        own: the windows that the model still has to write itself; None: none.
        about: what ``upcycle.json`` says about those that it has written.
        images: the images that the numbers in ``windows`` stand for; None: the model reads text.
        inputs: what a model reads that pauses at its layers and reads more than a text; None: ``windows`` are all.
    """

    windows: torch.Tensor | None = None
    samples: Samples | None = None
    own: OwnText | None = None
    about: dict[str, Any] = field(default_factory=dict)
    images: ImageSet | None = None
    inputs: InputSet | None = None

    @property
    def ids(self) -> list[torch.Tensor]:
        """All token ids that are read, samples first."""
        return [ids for ids in (self.samples.windows if self.samples else None, self.windows) if ids is not None]

    def written(self, checkpoint: Checkpoint, folder: Path, progress: Progress) -> TokensRead:
        """Return the tokens with those that the model writes, which are kept in ``folder`` until the conversion is complete.

        Raises:
            UsageError: what the model writes is repetition.
            CheckpointError: its logits are not finite.
            EnvironmentFault: it does not fit in memory.
        """
        if self.own is None:
            return self
        if checkpoint.source.adapter is not None:
            raise UsageError(
                f"text of its own is written by a whole model, and {checkpoint.source.name} is an adapter",
                hint="merge it first: upcycle merge ADAPTER OUT; or calibrate on other text",
            )
        from upcycle.calibration.own_text import with_own_text

        windows, about = with_own_text(self.own, self.windows, checkpoint.source.path, folder / WRITTEN, progress)
        return replace(self, windows=windows, own=None, about={"written": about})


class ConversionJob(PlannedJob, Protocol):
    """A planned job that can be carried out: one class per kind of conversion, listed in :data:`upcycle.conversion.jobs.JOBS`.

    A job changes neither its arguments nor itself: methods that decide something return a new job.
    """

    takes_blueprints: ClassVar[bool]
    """Whether a saved ``blueprint.safetensors`` can decide such a conversion."""

    @classmethod
    def of_checkpoint(cls, recipe: Recipe, method: AnyMethod, checkpoint: Checkpoint) -> Self:
        """Plan a recipe on an opened checkpoint.

        Raises:
            UsageError: the recipe cannot be carried out on this model.
            RefusalError: no stock architecture holds the result.
        """

    @classmethod
    def of_configs(cls, recipe: Recipe, method: AnyMethod) -> Self:
        """Plan a recipe from its sources' ``config.json`` alone; raises as :meth:`of_checkpoint` does."""

    def given(self, blueprint: Path) -> Self:
        """Return the job with everything decided by a saved ``blueprint.safetensors``.

        Raises:
            UsageError: the file does not fit.
        """

    def read(self, checkpoint: Checkpoint, progress: Progress) -> TokensRead:
        """Read the text that decides the conversion, as token ids.

        Raises:
            UsageError: a text cannot be read.
            EnvironmentFault: there is too little memory to calibrate.
        """

    def decide(
        self, checkpoint: Checkpoint, tokens: TokensRead, folder: Path, progress: Progress
    ) -> tuple[Self, dict[str, Any] | None]:
        """Decide what depends on text and weights, and keep it in ``folder``, where another run finds it.

        Returns:
            The job with its decisions, and what ``upcycle.json`` says of the text (None: none was read).
        """

    def blocks(
        self, unit: Unit, checkpoint: Checkpoint, folder: Path, threads: int
    ) -> Iterator[tuple[OutputEntry, Iterator[torch.Tensor]]]:
        """Return every tensor of one unit as blocks of rows, in the order of the unit.

        Args:
            unit: a unit of the job.
            checkpoint: the source.
            folder: where decisions are kept until the conversion is complete.
            threads: the number that torch may use where it computes; copies use one.
        """

    def finish(self, folder: Path) -> list[dict[str, Any]]:
        """Put the decisions into their final form in ``folder``, and return :meth:`reports`."""

    def reports(self, folder: Path) -> list[dict[str, Any]]:
        """Return what was measured and decided of every layer of a finished conversion, as plain data."""

    def verify(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        windows: MeasuredText,
        progress: Progress,
        training: dict[str, Any] | None = None,
    ) -> Verification:
        """Compare the result with the source.

        Args:
            checkpoint: the source.
            folder: the result.
            windows: what to measure on.
            progress: where to report.
            training: how the result was trained since, if it was.

        Raises:
            CheckpointError: the folder's tensors are not those of the plan, or stock transformers does not load it cleanly.
        """
