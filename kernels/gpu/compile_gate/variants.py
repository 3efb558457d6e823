"""The kernel variants of the shipped tiles: everything that training launches, recorded with tensors that have no memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from upcycle.kernels.gpu import backend
from upcycle.kernels.gpu.compile_gate.compile import KernelVariant, variant_of
from upcycle.kernels.gpu.launch_log import recorded
from upcycle.kernels.gpu.tile_table import TileTable
from upcycle.kernels.layout.dispatch import Dispatch
from upcycle.kernels.layout.expert_weights import ExpertWeights, Gradients

_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_HIDDEN, _WIDTH, _EXPERTS, _TOP_K = 2048, 768, 8, 2


def variants(table: TileTable) -> list[KernelVariant]:
    """All variants that training with this table launches, each once."""
    found: dict[KernelVariant, None] = {}
    for kind, size, rows in sorted({(kind, size, rows) for kind, size, _, rows in table}):
        found.update(dict.fromkeys(place_variants(kind, size, rows, table)))
    return list(found)


def place_variants(kind: str, size: int, rows: int, table: TileTable, family: str = "") -> Iterator[KernelVariant]:
    """The variants for one place of the table, for every layout that has kernels of its own; only of ``family``, if given."""
    for weights in _layouts(_DTYPES[size]):
        yield from training_variants(kind, weights, rows, table, family)


def training_variants(
    kind: str, weights: ExpertWeights, rows: int, table: TileTable, family: str = ""
) -> Iterator[KernelVariant]:
    """The variants that one forward and backward pass launches with this many rows per expert."""
    dispatch = meta_dispatch(rows * weights.num_experts // _TOP_K, weights.num_experts, _TOP_K)
    x = torch.empty(dispatch.tokens, weights.hidden, dtype=weights.up.dtype, device="meta")
    scores = torch.empty(dispatch.slots, device="meta")
    with recorded(kind) as launches:
        _, z = backend.forward(x, weights, dispatch, scores, True, table)
        everything = Gradients(x=x, up=weights.up, down=weights.down, scores=scores)
        backend.backward(x, x, weights, dispatch, scores, z, everything, table=table)
    for launch in launches:
        if not family or launch.family == family:
            yield variant_of(launch, kind)


def meta_dispatch(tokens: int, experts: int, top_k: int) -> Dispatch:
    """A dispatch of these shapes on the meta device."""

    def empty(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    slots = tokens * top_k
    return Dispatch(empty(slots), empty(slots), empty(slots), empty(experts + 1, torch.int64), None, tokens, top_k)


def _layouts(dtype: torch.dtype) -> Iterator[ExpertWeights]:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    widths = (_WIDTH,) * _EXPERTS
    rows = _WIDTH * _EXPERTS
    yield ExpertWeights(empty(2 * rows, _HIDDEN), empty(rows, _HIDDEN), interleaved=True, widths=widths)
    if dtype == torch.float32:
        return
    yield ExpertWeights(empty(_EXPERTS, 2 * _WIDTH, _HIDDEN), empty(_EXPERTS, _HIDDEN, _WIDTH))
    yield ExpertWeights(empty(rows, _HIDDEN), empty(rows, _HIDDEN), activation="relu2", gated=False, widths=widths)
