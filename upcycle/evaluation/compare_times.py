"""Times the shapes of a comparison's candidates beside the dense parent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from upcycle.conversion.threads import torch_threads
from upcycle.evaluation.candidate_walk import Candidate
from upcycle.evaluation.shape_speed import (
    GENERATE,
    OWN,
    ROUNDS,
    STOCK,
    ShapeKey,
    Times,
    prompt_length,
    relative_times,
)
from upcycle.hardware.clocks import clock
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint

_SMALL_BYTES = 1 << 26  # of all layers in fp32


@dataclass(frozen=True)
class Timing:
    """Holds the times of shapes relative to the dense model's, and the dense model's own.

    ``about`` says how they were measured, as plain data.
    """

    dense: Times
    shapes: Mapping[ShapeKey, Times]
    about: dict[str, Any]

    def times(self, candidate: Candidate) -> dict[str, dict[str, float]] | None:
        """Return ``prefill`` and ``decode`` relative to the dense model's, for each implementation of experts."""
        name = shape_name(candidate)
        found = {how: self.shapes.get((name, how)) for how in (STOCK, OWN)}
        return {how: {"prefill": t.prefill, "decode": t.decode} for how, t in found.items() if t} or None

    def requests(self, candidate: Candidate) -> dict[str, float]:
        """Return the time of a whole request relative to the dense model's, for each implementation of experts."""
        name, dense = shape_name(candidate), self.dense
        relative = {how: self.shapes[name, how] for how in (STOCK, OWN) if (name, how) in self.shapes}
        return {
            how: Times(t.prefill * dense.prefill, t.decode * dense.decode).request() / dense.request()
            for how, t in relative.items()
        }


def shape_name(candidate: Candidate) -> str:
    """Name what a candidate's time depends on."""
    shape = candidate.job.shape
    if candidate.baseline == "static":
        return f"pruned to {kept_neurons(candidate)}"
    return f"{shape.experts} experts, {shape.top_k} chosen, {shape.shared} shared, of {shape.expert_size}"


def kept_neurons(candidate: Candidate) -> int:
    """Return how many neurons static pruning keeps per layer: as many as the candidate runs per token."""
    shape = candidate.job.shape
    share = (shape.shared + shape.top_k) / (shape.shared + shape.experts)
    return round(share * candidate.job.dense.intermediate_size)


def time_candidates(
    checkpoint: DenseCheckpoint,
    candidates: Sequence[Candidate],
    batch: int,
    progress: Progress,
    rounds: int = ROUNDS,
    dtype: torch.dtype = torch.float32,
) -> Timing:
    """Time every shape among the candidates once; the arguments are those of :func:`relative_times`.

    A small model is timed on one thread: its operations are over before a second thread has begun, and where other programs run, too,
    threads that wait for each other take most of the time.
    """
    raw, dense = checkpoint.raw_config, checkpoint.config
    shapes: dict[str, tuple[Mapping[str, Any], int]] = {}
    for candidate in candidates:
        job = candidate.job
        count = len(job.shape.moe_layers)
        if candidate.baseline == "static":
            shapes[shape_name(candidate)] = checkpoint.family.narrowed(raw, kept_neurons(candidate)), count
        elif candidate.baseline is None:
            everywhere = replace(job.shape, moe_layers=tuple(range(dense.num_hidden_layers)))
            shapes[shape_name(candidate)] = job.target.full_config(job.dense, everywhere, "float32"), count
    stored = checkpoint.family.stored_specs(dense, 0).values()
    layer_bytes = 4 * sum(math.prod(shape) for shape in stored)
    return Timing(*time_beside(raw, shapes, layer_bytes, dense.num_hidden_layers, batch, progress, rounds, dtype))


def time_beside(
    raw: Mapping[str, Any],
    shapes: Mapping[str, tuple[Mapping[str, Any], int]],
    layer_bytes: int,
    layers: int,
    batch: int,
    progress: Progress,
    rounds: int = ROUNDS,
    dtype: torch.dtype = torch.float32,
) -> tuple[Times, dict[ShapeKey, Times], dict[str, Any]]:
    """Return the parent's times, those of shapes relative to it, and how they were measured, as plain data.

    Args:
        raw: the parent's ``config.json``.
        shapes: see :func:`relative_times`.
        layer_bytes: of one layer of the parent in fp32.
        layers: how many it has.
        batch: sequences at a time.
        progress: receives the progress.
        rounds: how often each model is timed.
        dtype: that of weights and states.
    """
    small = layer_bytes * layers <= _SMALL_BYTES
    with torch_threads(1 if small else torch.get_num_threads()):
        parent, relative = relative_times(
            raw, shapes, layer_bytes, batch=batch, rounds=rounds, dtype=dtype, progress=progress
        )
        about = {
            "device": "cpu",
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "clock": clock().__name__,
            "prompt_tokens": prompt_length({"": raw}),
            "generated_tokens": GENERATE,
            "prefill_seconds": parent.prefill,
            "decode_seconds": parent.decode,
        }
    return parent, relative, about
