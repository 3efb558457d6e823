"""Carries out growth steps: copies whole tensors of a model into a larger one, and compares them bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from upcycle.architectures.dense.widened import GrownTensor
from upcycle.architectures.tensor_origin import Origin
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.output_layout import OutputEntry, Unit
from upcycle.conversion.job import TokensRead
from upcycle.methods.base import AnyMethod
from upcycle.methods.growing.base import Described
from upcycle.planning.from_configs import describe_dense, describe_moe
from upcycle.planning.growth_job import GrowthJob, decide_growth, decided_growth, growth_reports, prepare_growth
from upcycle.planning.open_sources import mix_of
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from upcycle.planning.verification_text import MeasuredText
    from upcycle.verification.verdict import Verification


@dataclass(frozen=True)
class GrowthConversion(GrowthJob):
    """A job that writes whole tensors of its source. Implements :class:`upcycle.conversion.job.ConversionJob`."""

    takes_blueprints: ClassVar[bool] = False

    @classmethod
    def of_checkpoint(cls, recipe: Recipe, method: AnyMethod, checkpoint: Checkpoint) -> Self:
        """Plan a step on an opened model, dense or not."""
        from upcycle.checkpoints.extended_moe import ExtendedMoe
        from upcycle.files.records import made_of

        raw, specs, source = checkpoint.raw_config, checkpoint.store.specs, checkpoint.source
        added = None
        if isinstance(checkpoint, ExtendedMoe):
            other = checkpoint.added
            added = Described(other.raw_config, other.store.specs, other.source.name)
        described = Described(raw, specs, source.name, made_of(source.path), added)
        return prepare_growth(cls, recipe, method, described, checkpoint.has_tokenizer, mix_of(checkpoint))

    @classmethod
    def of_configs(cls, recipe: Recipe, method: AnyMethod) -> Self:
        """Plan a step from its source's ``config.json`` alone."""
        if method.takes == "moe":
            return prepare_growth(cls, recipe, method, describe_moe(recipe, method))
        found = describe_dense(recipe, method)
        described = Described(found.raw, found.specs, recipe.source)
        return prepare_growth(cls, recipe, method, described, mix=found.mix)

    def given(self, blueprint: Path) -> Self:
        """Return the job unchanged: ``takes_blueprints`` is false, so that this is never called."""
        raise AssertionError(f"{self.method.name} takes no blueprint, such as {blueprint}")

    def read(self, checkpoint: Checkpoint, progress: Progress) -> TokensRead:
        """Read the text on which experts are chosen, where the step needs one."""
        if not self.calibrated:
            return TokensRead()
        from upcycle.calibration.read_tokens import calibration_windows

        windows, own = calibration_windows(self, checkpoint, progress)
        return TokensRead(windows, own=own)

    def decide(
        self, checkpoint: Checkpoint, tokens: TokensRead, folder: Path, progress: Progress
    ) -> tuple[Self, dict[str, Any] | None]:
        """Decide which experts are copied."""
        from upcycle.text.mixture import traces

        job, record = decide_growth(self, checkpoint, tokens.windows, folder, progress)
        return job, record and {**record, **traces(self.recipe.calibration), **tokens.about}

    def blocks(
        self, unit: Unit, checkpoint: Checkpoint, folder: Path, threads: int
    ) -> Iterator[tuple[OutputEntry, Iterator[torch.Tensor]]]:
        """Yield every tensor of one unit as blocks of rows of the source's; one that grew as a whole."""
        import torch

        for entry in unit.entries:
            assert entry.origin is not None
            if isinstance(entry.origin, GrownTensor):
                whole = torch.cat([*checkpoint.blocks(Origin(entry.origin.name), self.recipe.dtype)])
                yield entry, iter([entry.origin.grown(entry.name, whole)])
                continue
            yield entry, checkpoint.blocks(entry.origin, self.recipe.dtype)

    def finish(self, folder: Path) -> list[dict[str, Any]]:
        """Return :meth:`reports`; the file that holds the decision is final already."""
        return growth_reports(folder)

    def reports(self, folder: Path) -> list[dict[str, Any]]:
        """Return which of the source's experts every layer is made of, and the utilities that chose them."""
        return growth_reports(folder)

    def verify(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        windows: MeasuredText,
        progress: Progress,
        training: dict[str, Any] | None = None,
    ) -> Verification:
        """Compare every tensor with its origin, and the logits of both models."""
        from upcycle.verification.verify_growth import verify_growth

        return verify_growth(decided_growth(self, folder), checkpoint, folder, windows, progress)
