"""Times candidate tiles for one layer on this machine's GPU; the result is a table for ``UPCYCLE_TILES``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from upcycle.kernels.gpu.backend import backward, forward
from upcycle.kernels.gpu.compile_gate.candidates import candidates
from upcycle.kernels.gpu.launch import form_of
from upcycle.kernels.gpu.launch_log import Launch, recorded, start
from upcycle.kernels.gpu.tile_table import KERNEL_FAMILIES, Tile, TileTable, default_table
from upcycle.kernels.layout.dispatch import Dispatch, route
from upcycle.kernels.layout.expert_weights import ExpertWeights, Gradients

Timer = Callable[[Callable[[], None]], float]


def tune(
    weights: ExpertWeights,
    tokens: Sequence[int],
    top_k: int,
    kind: str,
    timer: Timer,
    told: Callable[[str], None] = lambda line: None,
) -> TileTable:
    """The default table with the fastest tiles for one layer.

    Args:
        weights: of the layer, on the GPU, with random values: zeros take less power, and so less time.
        tokens: batch sizes; each decides one bucket of rows per expert.
        top_k: experts per token, drawn evenly.
        kind: the part of the table to fill.
        timer: seconds (or any unit) of a call; what does not fit on the GPU raises.
        told: called with one line per decision.
    """
    table, size = default_table(), weights.up.element_size()
    families = [name for name in KERNEL_FAMILIES if not name.startswith("up/") or name == f"up/{form_of(weights)}"]
    for number in tokens:
        rows = -(-number * top_k // weights.num_experts)
        x = torch.randn(number, weights.hidden, dtype=weights.up.dtype, device=weights.up.device)
        dispatch = _even_dispatch(number, weights.num_experts, top_k, x.device)
        for family in families:
            options = candidates(size, family)
            place = min((held for held in options if held >= rows), default=max(options))
            best: tuple[float, Tile] | None = None
            for tile in options[place]:
                tried = table.replaced({(kind, size, family, place): tile})
                seconds = _time(launches(x, weights, dispatch, kind, tried, family), timer)
                if seconds is not None and (best is None or seconds < best[0]):
                    best = seconds, tile
            if best is None:
                told(f"{family}, {place} rows per expert: no candidate fits on this GPU, the default stays")
                continue
            table = table.replaced({(kind, size, family, place): best[1]})
            told(f"{family}, {place} rows per expert: {best[1].as_list()}, {best[0]:.3f} ms")
    return table


def launches(
    x: torch.Tensor, weights: ExpertWeights, dispatch: Dispatch, kind: str, table: TileTable, family: str
) -> list[Launch]:
    """The launches of one family in a training step, with their buffers, which hold random values."""
    scores = torch.rand(dispatch.slots, device=x.device)
    needs = Gradients(x=x, up=weights.up, down=weights.down, scores=scores)
    with recorded(kind) as found:
        _, z = forward(x, weights, dispatch, scores, True, table)
        backward(x, x, weights, dispatch, scores, z, needs, table=table)
    chosen = [launch for launch in found if launch.family == family]
    given = {id(tensor) for tensor in (x, scores, weights.up, weights.down)}
    for launch in chosen:
        for value in launch.arguments.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and id(value) not in given:
                value.normal_()
    return chosen


def _time(work: list[Launch], timer: Timer) -> float | None:
    def run() -> None:
        for launch in work:
            start(launch)

    try:
        return timer(run)
    except Exception as error:
        # Triton's OutOfResources, whichever module this version keeps it in; anything else is a fault.
        if type(error).__name__ == "OutOfResources":
            return None
        raise


def _even_dispatch(tokens: int, experts: int, top_k: int, device: torch.device) -> Dispatch:
    slots = torch.arange(tokens * top_k, device=device) % experts
    return route(slots.view(tokens, top_k), experts)
