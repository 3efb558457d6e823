"""Carries out compressions of a Mixture-of-Experts: observes it on text, cuts its layers, refits and writes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.expert_terms import DenseMatrix, LayerCut
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.output_layout import OutputEntry, Unit, checked_finite
from upcycle.conversion.growth_conversion import GrowthConversion
from upcycle.conversion.job import TokensRead
from upcycle.errors import CheckpointError, UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.output.workspace import LAYER_BLUEPRINTS, remove_parts
from upcycle.files.user_paths import user_path
from upcycle.methods.base import AnyMethod
from upcycle.planning.compress_job import (
    CUTS_FILE,
    CompressJob,
    checked_compression,
    cut_reports,
    decided_cuts,
    read_cuts,
    write_cuts,
)
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
    from upcycle.methods.compressing.base import Cut, Matrices
    from upcycle.methods.compressing.observations import Observations
    from upcycle.planning.verification_text import MeasuredText
    from upcycle.verification.verdict import Verification


@dataclass(frozen=True)
class CompressConversion(CompressJob, GrowthConversion):
    """A job that leaves out or merges experts. Implements :class:`upcycle.conversion.job.ConversionJob`."""

    @classmethod
    def of_checkpoint(cls, recipe: Recipe, method: AnyMethod, checkpoint: Checkpoint) -> Self:
        """Plan a compression of an opened MoE.

        Raises:
            UsageError: its recipe cannot be carried out, or its observations are of other weights.
        """
        job = checked_compression(super().of_checkpoint(recipe, method, checkpoint))
        if job.about is not None and job.about["model"] != checkpoint.fingerprint:
            raise UsageError(
                f"observations: {recipe.observations} is of other weights than {checkpoint.source.name}",
                hint="leave --observations out, or make the file again: upcycle observe MOE FILE --calibration TEXT",
            )
        return job

    @classmethod
    def of_configs(cls, recipe: Recipe, method: AnyMethod) -> Self:
        """Plan a compression from its source's ``config.json`` alone."""
        return checked_compression(super().of_configs(recipe, method))

    def decide(
        self, checkpoint: Checkpoint, tokens: TokensRead, folder: Path, progress: Progress
    ) -> tuple[Self, dict[str, Any] | None]:
        """Observe the model, unless a file of observations was given; cut every layer, and refit what is left."""
        from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
        from upcycle.text.mixture import traces
        from upcycle.text.text_record import text_record

        assert isinstance(checkpoint, MoeCheckpoint)
        windows = tokens.windows
        text = None if windows is None else {**text_record(self.recipe, windows), **traces(self.recipe.calibration)}
        if not (folder / CUTS_FILE).exists():
            write_cuts(folder, self._cuts(checkpoint, windows, text, folder, progress), {})
        job = decided_cuts(self, folder)
        if self.refits and "refit" not in read_json(folder / CUTS_FILE):
            assert windows is not None
            cuts = read_cuts(folder)
            found = job._refit(checkpoint, cuts, windows, folder, progress)
            write_cuts(folder, cuts, {"refit": {str(layer): report for layer, report in found.items()}})
        return job, None if text is None else {**text, **tokens.about}

    def _refit(
        self,
        checkpoint: MoeCheckpoint,
        cuts: dict[int, Cut],
        windows: torch.Tensor,
        folder: Path,
        progress: Progress,
    ) -> dict[int, dict[str, float]]:
        """Refit what the experts of every layer became."""
        dtype = self.recipe.dtype
        if not self.compression.dense:
            from upcycle.calibration.refit_cut import refit_cuts

            kept = {layer: cut for layer, cut in cuts.items() if isinstance(cut, LayerCut)}
            if self.compression.ternary:
                from upcycle.calibration.round_ternary import round_ternary

                return round_ternary(checkpoint, self.config, kept, dtype, windows, folder, progress)
            training = None
            if self.refit == "blocks":
                from upcycle.ffn.reconstruction import BlockSchedule

                training = BlockSchedule(**self.recipe.reconstruction.model_dump())
            seed = self.recipe.seed
            return refit_cuts(checkpoint, self.config, kept, dtype, windows, folder, progress, training, seed)
        from upcycle.calibration.refit_dense import refit_dense

        entries = [(unit.layer, entry) for unit in self.units for entry in unit.entries]
        down = {layer: e.name for layer, e in entries if layer in cuts and self._part(e) == "down"}
        pieces = self.grown.pieces
        return refit_dense(checkpoint, self.config, pieces, [*cuts], down, dtype, windows, folder, progress)

    @cached_property
    def _routers(self) -> frozenset[str]:
        model = self.moe
        return frozenset(name for names in model.names.values() for name in names if model.role(name) == "router")

    def _part(self, entry: OutputEntry) -> str:
        """Return which matrix of experts, or of what they became, a tensor is, or ``router``; empty: none."""
        from upcycle.architectures.stored_moe import matrix_of

        if entry.name in self._routers and not self.compression.dense:
            return "router"
        return entry.origin.part if isinstance(entry.origin, DenseMatrix) else matrix_of(entry.name)

    def _cuts(
        self,
        checkpoint: MoeCheckpoint,
        windows: torch.Tensor | None,
        text: dict[str, Any] | None,
        folder: Path,
        progress: Progress,
    ) -> dict[int, Any]:
        keep, model = self.keep, checkpoint.model
        if not self.changes or not self.compression.observes:
            return dict.fromkeys(model.moe_layers, self.compression.before(model, keep))
        seen = self._observed(checkpoint, windows, text or {}, folder, progress)
        return self.compression.cuts(model, seen, keep, partial(_matrices, checkpoint), self.recipe.seed)

    def _observed(
        self,
        checkpoint: MoeCheckpoint,
        windows: torch.Tensor | None,
        text: dict[str, Any],
        folder: Path,
        progress: Progress,
    ) -> Observations:
        """Return the observations that the recipe names, or make them."""
        from upcycle.calibration.observe_moe import observe_layers
        from upcycle.methods.compressing.observations import OBSERVATIONS_FILE, Observations, noted

        if self.recipe.observations is not None:
            return noted(Observations.read(user_path(self.recipe.observations)), progress)
        assert windows is not None
        (folder / LAYER_BLUEPRINTS).mkdir(exist_ok=True)
        path = folder / LAYER_BLUEPRINTS / OBSERVATIONS_FILE
        if not path.exists():
            observe_layers(checkpoint, self.recipe.dtype, windows, text, progress).write(path)
        return noted(Observations.read(path), progress)

    def blocks(
        self, unit: Unit, checkpoint: Checkpoint, folder: Path, threads: int
    ) -> Iterator[tuple[OutputEntry, Iterator[torch.Tensor]]]:
        """Yield every tensor of one unit as blocks: experts of the source, sums of them, or refitted down projections."""
        from upcycle.calibration.refit_cut import refitted_part

        fitted = self._refitted(unit, folder)
        for entry in unit.entries:
            assert entry.origin is not None
            if (whole := refitted_part(fitted, self._part(entry))) is not None:
                yield entry, _refitted_blocks(entry, whole)
            else:
                yield entry, checkpoint.blocks(entry.origin, self.recipe.dtype)

    def _refitted(self, unit: Unit, folder: Path) -> dict[str, torch.Tensor]:
        from upcycle.calibration.refit_cut import down_file

        if unit.layer is None or not self.refits or unit.layer not in read_cuts(folder):
            return {}
        path = down_file(folder, unit.layer)
        if not path.exists():  # written without it, the layer would be one that nobody fitted
            raise CheckpointError(
                f"{path} is missing", hint="--restart discards the unfinished result and begins again"
            )
        from safetensors.torch import load_file

        return load_file(path)

    def finish(self, folder: Path) -> list[dict[str, Any]]:
        """Remove what only the writing needed, and return :meth:`reports`."""
        remove_parts(folder)
        return cut_reports(folder)

    def reports(self, folder: Path) -> list[dict[str, Any]]:
        """Return what every layer's experts are made of."""
        return cut_reports(folder)

    def verify(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        windows: MeasuredText,
        progress: Progress,
        training: dict[str, Any] | None = None,
    ) -> Verification:
        """Compare every tensor that was not refitted with its origin, and the logits of both models."""
        from upcycle.verification.verify_growth import verify_growth

        return verify_growth(decided_cuts(self, folder), checkpoint, folder, windows, progress, self._same)

    def _same(self, entry: OutputEntry) -> bool:
        """Return whether a tensor must equal its origin.

        Refitted ones need not, nor those of a decomposition, which another machine may round otherwise.
        """
        if isinstance(entry.origin, DenseMatrix) and any(part.rank for part in entry.origin.cut.parts):
            return False
        return self._part(entry) not in self.refitted_parts


def _refitted_blocks(entry: OutputEntry, whole: torch.Tensor) -> Iterator[torch.Tensor]:
    from upcycle.architectures.stored_moe import expert_index

    place = expert_index(entry.name)
    block = whole if place is None else whole[place]
    yield checked_finite(entry, block.reshape(entry.spec.shape))


def _matrices(checkpoint: MoeCheckpoint, layer: int) -> Matrices:
    """Return what reads the matrices of one expert of a layer."""
    return partial(checkpoint.matrices, layer)
