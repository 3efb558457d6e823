"""Keeps what a compression found on text until it is written; thin matrices, alone or multiplied with each other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.architectures.expert_terms import LayerCut
from upcycle.architectures.fused_form import fused_form_of
from upcycle.architectures.stored_moe import expert_index, matrix_of
from upcycle.checkpoints.output_layout import OutputEntry
from upcycle.errors import CheckpointError
from upcycle.files.atomic_files import write_whole
from upcycle.files.output.workspace import LAYER_BLUEPRINTS
from upcycle.planning.compress_job import read_cuts

if TYPE_CHECKING:
    import torch


def _file(folder: Path, layer: int) -> Path:
    return folder / LAYER_BLUEPRINTS / f"factors.{layer:05d}.safetensors"


def write_factors(folder: Path, layer: int, factors: dict[str, torch.Tensor]) -> None:
    """Write the factors of a layer; the file appears complete or not at all."""
    from safetensors.torch import save_file

    (folder / LAYER_BLUEPRINTS).mkdir(exist_ok=True)
    write_whole(_file(folder, layer), partial(save_file, factors))


def read_factors(folder: Path, layer: int) -> dict[str, torch.Tensor]:
    """Return the factors of a layer: ``up_in`` ``[R, d]``, ``up_out`` ``[R, 2 F]``, ``down_in`` ``[R', F]``, ``down_out`` ``[R', d]``.

    Raises:
        CheckpointError: they are missing.
    """
    return kept_file(_file(folder, layer))


def kept_file(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file that deciding or fitting a layer wrote.

    Raises:
        CheckpointError: it is missing: without it, the layer would be one that nobody decided or fitted.
    """
    from safetensors.torch import load_file

    if not path.exists():
        raise CheckpointError(f"{path} is missing", hint="--restart discards the unfinished result and begins again")
    return load_file(path)


def product(entry: OutputEntry, layer: int, folder: Path) -> torch.Tensor:
    """Return the products that a tensor of one expert, or of all, of a stock class holds."""
    import torch

    factors, part = read_factors(folder, layer), matrix_of(entry.name)
    cut = read_cuts(folder)[layer]
    assert isinstance(cut, LayerCut)
    kind, place = ("down", 1) if part == "down" else ("up", 0)
    own = [rank[place] for rank in cut.ranks]
    pairs = zip(factors[f"{kind}_out"].split(own), factors[f"{kind}_in"].split(own), strict=True)
    whole = [out.T @ inner for out, inner in pairs]
    if part in ("gate", "up"):
        whole = [matrix.chunk(2)[("gate", "up").index(part)] for matrix in whole]
    expert = expert_index(entry.name)
    made = fused_form_of(entry.origin).stored(torch.stack(whole)) if expert is None else whole[expert]
    return made.to(getattr(torch, entry.spec.dtype)).reshape(entry.spec.shape).contiguous()
