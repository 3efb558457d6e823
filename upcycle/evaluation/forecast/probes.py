"""Times small pieces of a conversion on this machine, with random weights: how long they take depends on their shapes alone.

All of them together take about a second for a layer of 2,000 neurons. Of larger layers a part is timed, whose time is scaled up: work
per token by its matrix products, work per layer (factorisations) by the cube of the width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear, log_softmax

from upcycle.calibration.decide_layer import decide_layer
from upcycle.ffn.activations import HELD_OUT_EVERY, Activations
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.neurons import Neurons
from upcycle.hardware.clocks import clock

if TYPE_CHECKING:
    from upcycle.planning.expert_job import ExpertJob

_WIDEST = 2048  # neurons of a layer that is timed whole
_TOKENS = 1024  # that a pass is timed on
_FEW, _MANY = 1024, 3072  # tokens that a layer is decided on, to tell what each of them costs from what the layer does
_FILE = 1 << 25  # bytes
_SPREAD = 0.02  # of random weights


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Return the least time that some work takes in so many times."""
    now, times = clock(), []
    for _ in range(repeats):
        start = now()
        work()
        times.append(now() - start)
    return min(times)


@dataclass(frozen=True)
class LayerTimes:
    """Holds seconds of one decoder layer.

    Attributes:
        ffn: of a pass through its FFN, per token.
        token: of deciding it, per calibration token.
        fixed: of deciding it, whatever the tokens.
    """

    ffn: float
    token: float
    fixed: float


def layer_times(job: ExpertJob) -> LayerTimes:
    """Time a layer's FFN, and where it is calibrated, how long deciding it takes."""
    by = _parts(job)
    job = _narrowed(job, by)
    layer = job.shape.moe_layers[0]
    ffn = _random_ffn(job, layer)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(_MANY, job.dense.hidden_size, generator=rng)
    with torch.no_grad():
        passing = seconds(lambda: linear(Neurons(ffn)(x[:_TOKENS]), ffn.down.float())) / _TOKENS
        if not job.calibrated:
            return LayerTimes(passing * by**2, 0.0, 0.0)
        few, many = (seconds(partial(_decide, job, ffn, x[:tokens]), 1) for tokens in (_FEW, _MANY))
    token = max(0.0, many - few) / (_MANY - _FEW)
    return LayerTimes(passing * by**2, token * by**2, max(0.0, few - _FEW * token) * by**3)


def _decide(job: ExpertJob, ffn: FeedForward, x: torch.Tensor) -> None:
    """Decide a layer on some tokens as a conversion does on all of them, and compute what it puts out."""
    job = _fewer_tokens(job, len(x) / job.recipe.calibration.tokens)
    batch = len(x) // HELD_OUT_EVERY
    activations = Activations.of(ffn, x, batch, cache_bytes=1 << 30)
    made = [linear(piece.hidden, ffn.down.float()) for piece in activations.batches()]

    def targets() -> Iterator[torch.Tensor]:
        return iter(made)

    decision = decide_layer(job, ffn, activations, targets)
    if job.calibration_mode == "sequential":
        for _ in decision.outputs.on_calibration():
            pass


def _fewer_tokens(job: ExpertJob, share: float) -> ExpertJob:
    """Return the job with every number of tokens that method and router look at cut to that share."""
    changed: dict[str, Any] = {}
    for key in ("method", "router"):
        plugin = getattr(job, key)
        if isinstance(tokens := getattr(plugin.parameters, "tokens", None), int):
            fewer = plugin.parameters.model_copy(update={"tokens": max(16, round(tokens * share))})
            changed[key] = type(plugin)(fewer)
    return replace(job, **changed)


def too_wide(job: ExpertJob) -> bool:
    """Return whether deciding a layer would take long to time, and no part of it can stand for all."""
    return job.dense.intermediate_size // _parts(job) > 2 * _WIDEST


def _parts(job: ExpertJob) -> int:
    """Return how many times narrower than a layer the part is that is timed: a power of two that divides all of its sizes."""
    sizes, by = (job.dense.hidden_size, job.dense.intermediate_size, job.shape.expert_size), 1
    while job.dense.intermediate_size // by > _WIDEST and not any(size % (2 * by) for size in sizes):
        by *= 2
    return by


def _narrowed(job: ExpertJob, by: int) -> ExpertJob:
    """Return the job for a layer that is narrower in every direction."""
    dense, shape = job.dense, job.shape
    smaller = replace(dense, hidden_size=dense.hidden_size // by, intermediate_size=dense.intermediate_size // by)
    return replace(job, dense=smaller, shape=replace(shape, expert_size=shape.expert_size // by))


def _random_ffn(job: ExpertJob, layer: int) -> FeedForward:
    dense = job.dense.at(layer)
    d, neurons = dense.hidden_size, dense.intermediate_size
    rng = torch.Generator().manual_seed(0)
    dtype = getattr(torch, job.dtype)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=rng).mul_(_SPREAD).to(dtype)

    form = job.shape.at(layer).form
    biases = {
        f"{name}_bias": torch.zeros(d if name == "down" else neurons, dtype=dtype)
        for name in ("gate", "up", "down")
        if name in form.biases
    }
    gate = matrix(neurons, d) if form.gated else None
    return FeedForward(
        layer, gate, matrix(neurons, d), matrix(d, neurons), torch.ones(d, dtype=dtype), form.activation, **biases
    )


def product_seconds(rows: int, inner: int, columns: int) -> float:
    """Return the seconds of one multiplication in an fp32 matrix product of about these sizes."""
    inner, columns = min(inner, 2048), min(columns, 4096)  # beyond these, rates change little
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    return seconds(lambda: linear(a, b)) / (rows * inner * columns)


def comparison_seconds(vocab: int) -> float:
    """Return the seconds per token and entry of the vocabulary of comparing two models' logits."""
    columns = min(vocab, 8192)
    a, b = torch.randn(256, columns), torch.randn(256, columns)

    def compare() -> torch.Tensor:
        one, other = log_softmax(a, 1), log_softmax(b, 1)
        return (one.exp() * (one - other)).sum() + (a - b).double().square().sum()

    return seconds(compare) / (256 * columns)


@dataclass(frozen=True)
class ByteTimes:
    """Holds seconds per byte.

    Attributes:
        written: of weights that are checked, written and hashed.
        loaded: of weights that are read, and turned into fp32.
        streamed: of a file that is written and read back.
    """

    written: float
    loaded: float
    streamed: float


def byte_times(folder: Path | None = None) -> ByteTimes:
    """Time what is done to the bytes of weights, with a file in ``folder``, or where temporary files are."""
    weights = torch.randn(_FILE // 2).to(torch.bfloat16)
    block = weights.view(torch.uint8).numpy().data

    def write() -> None:
        with suppress(OSError), TemporaryFile(dir=folder, buffering=0) as file:
            file.write(block)
            file.seek(0)
            while file.read(1 << 22):
                pass

    streamed = seconds(write, 2) / _FILE
    hashed = seconds(lambda: hashlib.sha256(block).digest(), 2) / _FILE
    checked = seconds(lambda: weights.clone().isfinite().all(), 2) / _FILE
    widened = seconds(weights.float, 2) / _FILE
    return ByteTimes(written=streamed + hashed + checked, loaded=streamed + widened, streamed=streamed)
