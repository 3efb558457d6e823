"""Carries out compressions of a Mixture-of-Experts: observes it on text, cuts its layers, refits and writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.expert_terms import DenseMatrix, FactorRows, LayerCut, PackedMatrix
from upcycle.architectures.fused_form import fused_form_of
from upcycle.checkpoints.checkpoint import Checkpoint
from upcycle.checkpoints.output_layout import OutputEntry, Unit, checked_finite
from upcycle.conversion.factor_files import kept_file, product, read_factors, write_factors
from upcycle.conversion.growth_conversion import GrowthConversion
from upcycle.conversion.job import TokensRead
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.formats.tensor_files import CONFIG
from upcycle.files.output.workspace import LAYER_BLUEPRINTS, remove_parts
from upcycle.files.user_paths import user_path
from upcycle.methods.base import AnyMethod
from upcycle.methods.compressing.layer_source import ModelSource
from upcycle.planning.compress_job import (
    CUTS_FILE,
    CompressJob,
    checked_compression,
    cut_reports,
    decided_cuts,
    read_cuts,
    write_cuts,
)
from upcycle.planning.precision.entries import InBits
from upcycle.progress import Progress
from upcycle.recipe.conversion_recipe import Recipe

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from upcycle.architectures.stored_moe import MoeModel
    from upcycle.architectures.tensor_origin import Origin
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
    from upcycle.ffn.reconstruction import BlockSchedule
    from upcycle.methods.compressing.described_cuts import Cut
    from upcycle.methods.compressing.layer_source import Matrices
    from upcycle.methods.compressing.observations import Observations
    from upcycle.planning.verification_text import MeasuredText
    from upcycle.verification.verdict import Verification


_MATRICES = ("gate", "up", "gate_up", "down")


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
        if self.changes and self.compression.makes:
            assert windows is not None
            job._make(checkpoint, windows, folder, progress)
        if self.refits and "refit" not in read_json(folder / CUTS_FILE):
            assert windows is not None
            cuts = read_cuts(folder)
            found = job._refit(checkpoint, cuts, windows, folder, progress)
            write_cuts(folder, cuts, {"refit": {str(layer): report for layer, report in found.items()}})
        if job.scheme is not None:
            from upcycle.conversion.round_result import round_result

            job = round_result(job, checkpoint, windows, folder, progress)
        return job, None if text is None else {**text, **tokens.about}

    def _make(self, checkpoint: MoeCheckpoint, windows: torch.Tensor, folder: Path, progress: Progress) -> None:
        """Let the method make what it makes of every layer."""
        from upcycle.calibration.compressing.made_parts import made_file, make_parts

        cuts = {layer: cut for layer, cut in read_cuts(folder).items() if isinstance(cut, LayerCut)}
        if not all(made_file(folder, layer).exists() for layer in cuts):
            make_parts(checkpoint, self.compression, cuts, self.keep, self.recipe.dtype, windows, folder, progress)

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
        if self.compression.depth:
            from upcycle.calibration.compressing.refit_depth import refit_depth
            from upcycle.methods.compressing.base import kept_of

            return refit_depth(checkpoint, self.config, kept_of(cuts), dtype, windows, folder, progress)
        if self.compression.mixes:
            from upcycle.calibration.compressing.refit_mixed import refit_mixed

            return refit_mixed(checkpoint, self.config, cuts, dtype, windows, folder, progress)
        if not self.compression.dense:
            from upcycle.calibration.compressing.refit_cut import refit_cuts

            kept = {layer: cut for layer, cut in cuts.items() if isinstance(cut, LayerCut)}
            if self.compression.ternary:
                from upcycle.calibration.compressing.round_ternary import round_ternary

                return round_ternary(checkpoint, self.config, kept, dtype, windows, folder, progress)
            pieces = self.grown.pieces if self.wraps else ()
            return refit_cuts(
                checkpoint,
                self.config,
                kept,
                dtype,
                windows,
                folder,
                progress,
                pieces,
                partial(self._blocks_of, checkpoint, folder),
                self._training(),
                self.recipe.seed,
            )
        from upcycle.calibration.compressing.refit_dense import refit_dense

        names: dict[int, dict[str, str]] = {layer: {} for layer in cuts}
        for entry in (entry for unit in self.units for entry in unit.entries):
            if isinstance(entry.origin, DenseMatrix):
                names[entry.origin.layer][entry.origin.part] = entry.name
        pieces, training = self.grown.pieces, self._training()
        return refit_dense(
            checkpoint,
            self.config,
            pieces,
            [*cuts],
            names,
            dtype,
            windows,
            folder,
            progress,
            training,
            self.recipe.seed,
        )

    def _training(self) -> BlockSchedule | None:
        """Return how layers are trained behind the closed form, if they are."""
        if self.refit != "blocks":
            return None
        from upcycle.ffn.reconstruction import BlockSchedule

        return BlockSchedule(**self.recipe.reconstruction.model_dump())

    @cached_property
    def _routers(self) -> frozenset[str]:
        model = self.moe
        return frozenset(name for names in model.names.values() for name in names if model.role(name) == "router")

    def _part(self, entry: OutputEntry) -> str:
        """Return which matrix of experts, or of what they became, a tensor is, or ``router``; empty: none."""
        from upcycle.architectures.stored_moe import matrix_of

        if isinstance(entry.origin, FactorRows):
            return "down" if entry.origin.part == "down_out" else entry.origin.part
        if isinstance(entry.origin, DenseMatrix | PackedMatrix):
            return entry.origin.part
        if entry.name in self._routers and not self.compression.dense:
            return "router"
        return matrix_of(entry.name)

    def _cuts(
        self,
        checkpoint: MoeCheckpoint,
        windows: torch.Tensor | None,
        text: dict[str, Any] | None,
        folder: Path,
        progress: Progress,
    ) -> dict[int, Any]:
        keep, model = self.keep, checkpoint.model
        matrices, store = partial(_matrices, checkpoint), partial(write_factors, folder)
        source = ModelSource(model, None, matrices, self.recipe.seed, store)
        if not self.changes or not self.compression.observes:
            return self.compression.unobserved(source, keep)
        source = replace(source, seen=self._observed(checkpoint, windows, text or {}, folder, progress))
        if not self.compression.tries:
            return self.compression.cuts(source, keep)
        from upcycle.calibration.compressing.try_cuts import CutTrial

        assert windows is not None
        # Tried in the stock class, whatever the result is written as.
        config = model.config_with(*self.compression.sizes(model, keep)[:3]) if self.wraps else self.config
        trial = CutTrial(checkpoint, config, self.recipe.dtype, windows, progress)
        return self.compression.cuts(replace(source, trial=trial), keep)

    def _observed(
        self,
        checkpoint: MoeCheckpoint,
        windows: torch.Tensor | None,
        text: dict[str, Any],
        folder: Path,
        progress: Progress,
    ) -> Observations:
        """Return the observations that the recipe names, or make them."""
        from upcycle.calibration.compressing.observe_moe import observe_layers
        from upcycle.methods.compressing.observations import OBSERVATIONS_FILE, Observations, noted

        if self.recipe.observations is not None:
            return noted(Observations.read(user_path(self.recipe.observations)), progress)
        assert windows is not None
        (folder / LAYER_BLUEPRINTS).mkdir(exist_ok=True)
        path = folder / LAYER_BLUEPRINTS / OBSERVATIONS_FILE
        if not path.exists():
            observe_layers(checkpoint, self.recipe.dtype, windows, text, progress, path)
        return noted(Observations.read(path), progress)

    def blocks(
        self, unit: Unit, checkpoint: Checkpoint, folder: Path, threads: int
    ) -> Iterator[tuple[OutputEntry, Iterator[torch.Tensor]]]:
        """Yield every tensor of one unit as blocks: experts of the source, sums of them, or refitted down projections."""
        from upcycle.calibration.compressing.refit_cut import refitted_part

        fitted, made, bits = self._refitted(unit, folder), self._made(unit, folder), self._rounded(unit, folder)
        for entry in unit.entries:
            assert entry.origin is not None
            part = self._part(entry)
            if isinstance(entry.origin, InBits):
                yield entry, iter([bits[entry.name]])
            elif (whole := refitted_part(fitted, part)) is not None:
                yield entry, _refitted_blocks(entry, whole, folder)
            elif unit.layer is not None and self._is_product(entry):
                yield entry, iter([checked_finite(entry, product(entry, unit.layer, folder))])
            elif made and self._is_made(entry):
                yield entry, _made_blocks(entry, part, made)
            else:
                yield entry, self._blocks_of(checkpoint, folder, entry.origin)

    def _blocks_of(self, checkpoint: Checkpoint, folder: Path, origin: Origin) -> Iterator[torch.Tensor]:
        """Yield a tensor of the result before it is refitted."""
        if not isinstance(origin, FactorRows):
            return checkpoint.blocks(origin, self.recipe.dtype)
        import torch

        dtype: torch.dtype = getattr(torch, checkpoint.dtype_of(origin.name, self.recipe.dtype))
        return iter([read_factors(folder, origin.layer)[origin.part].to(dtype)])

    def _is_product(self, entry: OutputEntry) -> bool:
        """Return whether a tensor holds products of factors in the place of experts' matrices."""
        return self.compression.factored and self.changes and not self.wraps and self._part(entry) in _MATRICES

    def _is_made(self, entry: OutputEntry) -> bool:
        """Return whether a tensor is one that the method made anew, or holds one."""
        if not self.changes or not self.compression.makes:
            return False
        part = self._part(entry)
        return part in ("router", *_MATRICES) and bool({*part.split("_")} & self.compression.makes)

    def _made(self, unit: Unit, folder: Path) -> dict[str, torch.Tensor]:
        if unit.layer is None or not self.changes or not self.compression.makes or unit.layer not in read_cuts(folder):
            return {}
        from upcycle.calibration.compressing.made_parts import made_file

        return kept_file(made_file(folder, unit.layer))

    def _rounded(self, unit: Unit, folder: Path) -> dict[str, torch.Tensor]:
        """Return the rounded matrices of a unit, by the names of their parts."""
        from upcycle.calibration.compressing.round_layers import bits_file

        if unit.layer is None or not any(isinstance(entry.origin, InBits) for entry in unit.entries):
            return {}
        return kept_file(bits_file(folder, unit.layer))

    def _refitted(self, unit: Unit, folder: Path) -> dict[str, torch.Tensor]:
        from upcycle.calibration.compressing.refit_cut import down_file

        if unit.layer is None or unit.layer not in self._fitted(folder):
            return {}
        return kept_file(down_file(folder, unit.layer))

    def _fitted(self, folder: Path) -> set[int]:
        """Return the layers of the source that were refitted."""
        return {int(layer) for layer in read_json(folder / CUTS_FILE).get("refit", {})} if self.refits else set()

    def finish(self, folder: Path) -> list[dict[str, Any]]:
        """Remove what only the writing needed, say in ``config.json`` how weights are stored, and return :meth:`reports`."""
        remove_parts(folder)
        if self.scheme is not None:
            config = {**read_json(folder / CONFIG), "quantization_config": self.scheme.settings}
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
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

        same = partial(self._same, self._fitted(folder), self.moe)
        return verify_growth(decided_cuts(self, folder), checkpoint, folder, windows, progress, same)

    def _same(self, fitted: set[int], model: MoeModel, entry: OutputEntry) -> bool:
        """Return whether a tensor must equal its origin.

        Refitted ones need not, nor those of a decomposition, which another machine may round otherwise, or that text decided.
        """
        if isinstance(entry.origin, InBits):
            return False
        if isinstance(entry.origin, DenseMatrix) and any(part.rank for part in entry.origin.cut.parts):
            return False
        if isinstance(entry.origin, FactorRows) or self._is_product(entry) or self._is_made(entry):
            return False
        assert entry.origin is not None
        return not (
            self._part(entry) in self.refitted_parts and model.module_paths.layer_of(entry.origin.name) in fitted
        )


def _refitted_blocks(entry: OutputEntry, whole: torch.Tensor, folder: Path) -> Iterator[torch.Tensor]:
    from upcycle.architectures.stored_moe import expert_index
    from upcycle.models.own.factored_experts import ranked_rows

    place = expert_index(entry.name)
    block = whole if place is None else whole[place]
    if isinstance(entry.origin, PackedMatrix):
        block = whole.mT.flatten(0, 1).contiguous()
    if isinstance(entry.origin, FactorRows):
        cut = read_cuts(folder)[entry.origin.layer]
        assert isinstance(cut, LayerCut)
        block = ranked_rows(whole, [rank for _, rank in cut.ranks])
    yield checked_finite(entry, fused_form_of(entry.origin).stored(block).reshape(entry.spec.shape))


def _made_blocks(entry: OutputEntry, part: str, made: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield a tensor that a method made: a router's rows, or matrices of one expert or of all."""
    from upcycle.architectures.stored_moe import expert_index

    place = expert_index(entry.name)
    whole = made[{"gate": "gate_up", "up": "gate_up", "": "router"}.get(part, part)]
    block = whole if place is None else whole[place]
    if part in ("gate", "up"):
        block = block.chunk(2)[part == "up"]
    yield checked_finite(entry, fused_form_of(entry.origin).stored(block).reshape(entry.spec.shape).contiguous())


def _matrices(checkpoint: MoeCheckpoint, layer: int) -> Matrices:
    """Return what reads the matrices of one expert of a layer."""
    return partial(checkpoint.matrices, layer)
