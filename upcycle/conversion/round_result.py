"""Rounds the result of a compression to few bits, after its experts were cut and refitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from upcycle.architectures.expert_terms import LayerCut
from upcycle.files.formats.parsing import read_json
from upcycle.planning.compress_job import (
    CUTS_FILE,
    CompressJob,
    decided_cuts,
    read_cuts,
    stored_in_bits,
    write_cuts,
)
from upcycle.planning.growth_job import shards_of_grown
from upcycle.planning.precision.entries import matrices_of

if TYPE_CHECKING:
    import torch

    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
    from upcycle.models.stock_layers import Layers
    from upcycle.planning.precision.scheme import Matrix
    from upcycle.progress import Progress

_Job = TypeVar("_Job", bound=CompressJob)


def round_result(
    job: _Job, checkpoint: MoeCheckpoint, windows: torch.Tensor | None, folder: Path, progress: Progress
) -> _Job:
    """Decide the bits of every expert, round all matrices, and return the job with what was decided.

    What an earlier run wrote to ``folder`` is kept.

    Args:
        job: the compression, whose cuts are decided and refitted.
        checkpoint: its source.
        windows: calibration text, token ids ``[N, W]``; None: none is read.
        folder: where decisions are kept.
        progress: where to report.
    """
    from upcycle.calibration.compressing.allocate_bits import allocated
    from upcycle.calibration.compressing.round_layers import round_layers

    content = read_json(folder / CUTS_FILE)
    if "precision" in content:
        return decided_cuts(job, folder)
    recipe = job.recipe.precision
    layers = _unrounded(job, checkpoint, folder)
    if recipe.mean is not None:
        job = stored_in_bits(replace(job, scheme=None), allocated(recipe, layers, _matrices(job), windows, progress))
    assert job.scheme is not None
    looks = recipe.rounding == "gptq" and recipe.looks
    found = round_layers(layers, _matrices(job), windows, looks, folder, progress)
    more = {key: value for key, value in content.items() if key != "experts"}
    bits = {str(layer): list(own) for layer, own in job.scheme.bits.items()}
    reports = {str(layer): report for layer, report in found.items()}
    write_cuts(folder, read_cuts(folder), {**more, "precision": {"bits": bits, "layers": reports}})
    return decided_cuts(job, folder)


def _matrices(job: CompressJob) -> dict[int, list[Matrix]]:
    """Return the matrices in few bits of every layer."""
    assert job.scheme is not None
    found: dict[int, list[Matrix]] = {}
    for shard in shards_of_grown(job.recipe, job.source, job.grown):
        for unit in shard.units:
            if unit.layer is not None:
                own = (matrix for _, some in matrices_of(unit, job.moe, job.scheme) for matrix in some)
                found[unit.layer] = list(own)
    return found


def _unrounded(job: CompressJob, checkpoint: MoeCheckpoint, folder: Path) -> Layers:
    """Return the layers of the result before it is rounded."""
    from upcycle.models.stock_layers import layers_of

    uncut = layers_of(checkpoint, job.recipe.dtype)
    if not job.changes:
        return uncut
    from upcycle.calibration.compressing.moe_walk import MoeWalk
    from upcycle.calibration.compressing.refit_cut import CutLayers, stored_dtype

    cuts = {layer: cut for layer, cut in read_cuts(folder).items() if isinstance(cut, LayerCut)}
    walk = MoeWalk(uncut, 8)
    layers = CutLayers(walk, job.config, cuts, partial(stored_dtype, checkpoint, job.recipe.dtype))
    return _Refitted(layers, walk, folder if job.refits else None, cuts)


class _Refitted:
    """Gives the layers of a cut model their refitted down projections. Implements :class:`upcycle.models.stock_layers.Layers`.

    Args:
        layers: the layers as they are cut.
        uncut: the layers that they are cut from.
        folder: where the refitted matrices are; None: nothing was refitted.
        cuts: the layers that were cut.
    """

    def __init__(self, layers: Any, uncut: Any, folder: Path | None, cuts: Mapping[int, LayerCut]) -> None:
        from upcycle.architectures.module_paths import module_paths_of

        self.model, self._layers, self._uncut, self._folder, self._cuts = layers.model, layers, uncut, folder, cuts
        self._modules = module_paths_of(self.model.config).layers_in(self.model)

    def load(self, index: int) -> None:
        """Load a layer; the one that it is cut from is in memory meanwhile."""
        with self._uncut.loaded(index):
            self._layers.load(index)
        if self._folder is None or index not in self._cuts:
            return
        from safetensors.torch import load_file

        from upcycle.calibration.compressing.refit_cut import down_file

        down = load_file(down_file(self._folder, index))["down"].float()
        for name, parameter in self._modules[index].named_parameters():
            if name.endswith("experts.down_proj"):
                parameter.data = down.reshape(parameter.shape)

    def drop(self, index: int) -> None:
        """Free a layer."""
        self._layers.drop(index)
