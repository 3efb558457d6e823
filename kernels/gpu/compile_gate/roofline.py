"""The least that a layer of experts must compute and move, and how long that takes at a GPU's peak: estimates, not measurements.

T tokens, K experts per token, R = T K rows, H hidden, I width, E experts. Every matrix is counted once per kernel that reads it,
as if tiles were reused perfectly.
"""

from __future__ import annotations

from dataclasses import dataclass

from upcycle.hardware.accelerators import device


@dataclass(frozen=True)
class Shape:
    """A layer of experts and the number of tokens that it is given."""

    name: str
    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    size: int = 2
    """Bytes per element."""

    @property
    def rows(self) -> int:
        """R, the number of rows."""
        return self.tokens * self.top_k


@dataclass(frozen=True)
class Gpu:
    """Peaks from the vendor's data sheet, dense bf16."""

    name: str
    flops: float
    bandwidth: float
    """Bytes per second."""


SHAPES = (
    Shape("Qwen3-30B-A3B", 8192, 2048, 768, 128, 8),
    Shape("Mixtral-8x7B", 8192, 4096, 14336, 8, 2),
    Shape("8 experts of 1024", 8192, 2048, 1024, 8, 2),
    Shape("64 experts of 128", 8192, 2048, 128, 64, 16),
    Shape("Qwen3-30B-A3B, decoding", 8, 2048, 768, 128, 8),
)
GPUS = tuple(Gpu(known.title, known.flops, known.bandwidth) for known in map(device, ("A100", "H100", "B200")))


@dataclass(frozen=True)
class Cost:
    """FLOPs to compute and bytes to move."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def floor(self, gpu: Gpu) -> float:
        """The least seconds that this takes on a GPU: computing and moving overlap perfectly."""
        return max(self.flops / gpu.flops, self.bytes / gpu.bandwidth)


def kernels(shape: Shape) -> dict[str, Cost]:
    """The cost of every launch in a training step of a gated layer, by name, in order."""
    rh, ri, th = shape.rows * shape.hidden, shape.rows * shape.width, shape.tokens * shape.hidden
    # Of a batch with fewer rows than experts, only the experts that are chosen are read.
    ehi = min(shape.experts, shape.rows) * shape.hidden * shape.width
    product = 2 * ri * shape.hidden
    elements = {
        "gather, first projection, activation": (2 * product, rh + 3 * ri + 2 * ehi),
        "down projection": (product, ri + rh + ehi),
        "sum per token": (2 * rh, rh + th),
        "gradient of the activation": (product, rh + ri + ehi),
        "backward of the activation": (0, 6 * ri),
        "gradient of down": (product, ri + rh + shape.experts * shape.hidden * shape.width),
        "gradient of gate and up": (2 * product, 2 * ri + rh + 2 * shape.experts * shape.hidden * shape.width),
        "gradient of rows": (2 * product, 2 * ri + rh + 2 * ehi),
        "gradient per token": (rh, rh + th),
    }
    return {name: Cost(flops, shape.size * count) for name, (flops, count) in elements.items()}


def total(shape: Shape, training: bool) -> Cost:
    """The cost of a forward pass, or of forward and backward."""
    costs = list(kernels(shape).values())
    return sum(costs[1:] if training else costs[1:3], costs[0])


def saved_bytes(shape: Shape, keep_z: bool = True) -> int:
    """Bytes kept for the backward pass besides weights and index vectors: ``size (T H + 2 R I)``, or ``size T H`` without z."""
    return shape.size * (shape.tokens * shape.hidden + 2 * shape.rows * shape.width * keep_z)
