"""Makes a dense model narrower: chooses dimensions, narrows and fits layer after layer, writes and verifies the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.dense.narrowed import KeptPairs, MadeTensor, NarrowSizes
from upcycle.checkpoints.checkpoint import Checkpoint, DenseCheckpoint
from upcycle.checkpoints.output_layout import OutputEntry, Unit, checked_finite
from upcycle.conversion.growth_conversion import GrowthConversion
from upcycle.conversion.job import TokensRead
from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.names import DECISION_FILE
from upcycle.files.output.workspace import remove_parts
from upcycle.methods.base import AnyMethod
from upcycle.methods.compressing.inside.modegpt import ModeGpt, dense_of
from upcycle.planning.cost import Plan
from upcycle.planning.growth_job import shards_of_grown
from upcycle.planning.job import check_text
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from upcycle.planning.verification_text import MeasuredText
    from upcycle.verification.verdict import Verification


@dataclass(frozen=True)
class NarrowConversion(GrowthConversion):
    """A job that makes a dense model's modules smaller. Implements :class:`upcycle.conversion.job.ConversionJob`."""

    @classmethod
    def of_checkpoint(cls, recipe: Recipe, method: AnyMethod, checkpoint: Checkpoint) -> Self:
        """Plan a narrowing of an opened dense model.

        Raises:
            UsageError: its recipe cannot be carried out.
        """
        return super().of_checkpoint(recipe, method, checkpoint)._checked()

    @classmethod
    def of_configs(cls, recipe: Recipe, method: AnyMethod) -> Self:
        """Plan a narrowing from its source's ``config.json`` alone."""
        return super().of_configs(recipe, method)._checked()

    def _checked(self) -> Self:
        if self.recipe.refit in ("scale", "blocks"):
            raise UsageError(
                f"refit: {self.recipe.refit} is of splits, and {self.recipe.method} makes a dense model narrower",
                hint="--refit down or none",
            )
        if self.calibrated:
            check_text(self.recipe, f"method {self.recipe.method}")
        return self

    @property
    def narrowing(self) -> ModeGpt:
        """The method."""
        assert isinstance(self.method, ModeGpt)
        return self.method

    @cached_property
    def sizes(self) -> NarrowSizes:
        """The sizes of the result."""
        family, dense = dense_of(self.source, self.method.name)
        return self.narrowing.sizes(family, dense, self.source, self.recipe)

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is read: wherever anything is cut."""
        return self.promise[0] != "exact"

    @property
    def refits(self) -> bool:
        """Whether projections are fitted to the dense model's stream."""
        return self.recipe.refit != "none" and self.calibrated

    @property
    def record(self) -> dict[str, Any]:
        """The keys that only this kind of conversion adds to ``upcycle.json``."""
        return {
            "target": self.target_name,
            "compression": self.grown.summary,
            "refit": "down" if self.refits else "none",
        }

    def cost(self) -> Plan:
        """Work out what the narrowing will write and need, from headers alone."""
        return replace(super().cost(), refit="down" if self.refits else "none")

    def decide(
        self, checkpoint: Checkpoint, tokens: TokensRead, folder: Path, progress: Progress
    ) -> tuple[Self, dict[str, Any] | None]:
        """Choose the dimensions of heads, and narrow and fit every layer."""
        from upcycle.text.mixture import traces
        from upcycle.text.text_record import text_record

        if tokens.windows is None:
            return self, None
        assert isinstance(checkpoint, DenseCheckpoint)
        path = folder / DECISION_FILE
        if not path.exists():
            found = self._narrowed(checkpoint, tokens.windows, folder, progress)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
            temporary.rename(path)
        about = {**text_record(self.recipe, tokens.windows), **traces(self.recipe.calibration), **tokens.about}
        return self._decided(folder), about

    def _narrowed(
        self, checkpoint: DenseCheckpoint, windows: torch.Tensor, folder: Path, progress: Progress
    ) -> dict[str, Any]:
        from upcycle.calibration.compressing.narrow_dense import choose_pairs, narrow_layers

        sizes, dtype = self.sizes, self.recipe.dtype
        pairs = None
        if sizes.head != checkpoint.config.head_dim:
            pairs = choose_pairs(checkpoint, sizes.head, dtype, windows, progress)
        job = self._with(pairs)
        ridge, kept = self.narrowing.parameters.ridge, pairs.pairs if pairs else ()
        config, choose = job.grown.config, self.narrowing.neurons
        layers = narrow_layers(
            checkpoint, config, sizes, kept, choose, ridge, self.refits, dtype, windows, folder, progress
        )
        return {"pairs": pairs and pairs._asdict(), "layers": {str(layer): found for layer, found in layers.items()}}

    def _decided(self, folder: Path) -> Self:
        """Return the job with the decision that is written in ``folder``."""
        path = folder / DECISION_FILE
        found = read_json(path).get("pairs") if path.exists() else None
        return self._with(found and KeptPairs(tuple(found["pairs"]), tuple(found["periods"]), found["factor"]))

    def _with(self, pairs: KeptPairs | None) -> Self:
        grown = self.narrowing.grow(self.source, self.recipe, pairs)
        return replace(self, grown=grown, shards=shards_of_grown(self.recipe, self.source, grown))

    def blocks(
        self, unit: Unit, checkpoint: Checkpoint, folder: Path, threads: int
    ) -> Iterator[tuple[OutputEntry, Iterator[torch.Tensor]]]:
        """Yield every tensor of one unit: as the dense model has it, or as it was made when the layer was narrowed."""
        made: dict[str, torch.Tensor] | None = None
        for entry in unit.entries:
            assert entry.origin is not None
            if not isinstance(entry.origin, MadeTensor):
                yield entry, checkpoint.blocks(entry.origin, self.recipe.dtype)
                continue
            if made is None:
                made = _made(folder, unit)
            yield entry, iter([checked_finite(entry, made[entry.origin.name])])

    def finish(self, folder: Path) -> list[dict[str, Any]]:
        """Remove what only the writing needed, and return :meth:`reports`."""
        if self.calibrated:
            remove_parts(folder)
        return self.reports(folder)

    def reports(self, folder: Path) -> list[dict[str, Any]]:
        """Return which neurons every layer keeps, and how the fits went; empty where nothing was cut."""
        path = folder / DECISION_FILE
        layers = read_json(path)["layers"] if path.exists() else {}
        return [{"layer": int(layer), **found} for layer, found in layers.items()]

    def verify(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        windows: MeasuredText,
        progress: Progress,
        training: dict[str, Any] | None = None,
    ) -> Verification:
        """Compare every tensor that was not made anew with its origin, and the logits of both models."""
        from upcycle.verification.verify_growth import verify_growth

        job = self._decided(folder)
        return verify_growth(job, checkpoint, folder, windows, progress, lambda e: not isinstance(e.origin, MadeTensor))


def _made(folder: Path, unit: Unit) -> dict[str, torch.Tensor]:
    """Return the new tensors of a layer, by the names of their origins."""
    from safetensors.torch import load_file

    from upcycle.calibration.compressing.narrow_dense import layer_tensors

    assert unit.layer is not None
    path = layer_tensors(folder, unit.layer)
    if not path.exists():
        raise CheckpointError(f"{path} is missing", hint="--restart discards the unfinished result and begins again")
    return load_file(path)
