"""What a model has to do to read a prompt, or to write a token: amounts, each of which takes time in proportion.

Every amount stands for one cause: starting an operation, multiplying, reading weights from memory, moving rows of activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PROMPT_READ = 256  # tokens that are read, and that a written one attends to
HOWS = ("grouped_mm", "upcycle")  # how sparse blocks are computed: by transformers' own code, or by upcycle's kernels
TimedPart = Literal["prefill", "decode"]
TIMED_PARTS: tuple[TimedPart, ...] = ("prefill", "decode")
Work = dict[str, float]


@dataclass(frozen=True)
class BlockShape:
    """The FFN of one layer: a dense one of ``width`` neurons if ``experts`` is 0, else routed experts of that width.

    ``shared`` is the width of the expert that always runs, 0 where there is none.
    """

    width: int
    experts: int = 0
    top_k: int = 0
    shared: int = 0


@dataclass(frozen=True)
class ModelShape:
    """All that a model's time depends on; ``blocks`` are kinds of FFNs, each with its number of layers.

    ``heads`` are the numbers of query and key heads, and the size of one.
    """

    hidden: int
    heads: tuple[int, int, int]
    vocabulary: int
    blocks: tuple[tuple[BlockShape, int], ...]


def work(model: ModelShape, part: TimedPart, how: str) -> Work:
    """Return the amounts by name, in units in which each takes about a millisecond."""
    found = _around(model, part)
    for block, count in model.blocks:
        amounts = _sparse(model.hidden, block, part, how) if block.experts else _dense(model.hidden, block, part)
        for name, amount in amounts.items():
            found[name] = found.get(name, 0.0) + count * amount
    return found


def milliseconds(fitted: Mapping[str, float], shape: ModelShape, part: TimedPart, how: str) -> float:
    """Return the predicted time of a model, given the milliseconds that were fitted to each amount."""
    return sum(fitted[name] * amount for name, amount in work(shape, part, how).items())


def _around(model: ModelShape, part: TimedPart) -> Work:
    """Return the amounts of everything but FFNs."""
    layers, d = sum(count for _, count in model.blocks), model.hidden
    queries, keys, size = model.heads
    projections = layers * 2 * d * (queries + keys) * size
    head = d * model.vocabulary
    if part == "decode":
        cache = layers * 2 * PROMPT_READ * keys * size
        return {
            "model": 1.0,
            "layers": layers,
            "weights": (projections + head) / 1e6,
            "rows": (layers * ((queries + 2 * keys) * size + d) + model.vocabulary) / 1e3,
            "keys and values": cache / 1e6,
        }
    return {
        "model": 1.0,
        "layers": layers,
        "projections": PROMPT_READ * projections / 1e8,
        "states": layers * PROMPT_READ * d / 1e6,
        "head": head / 1e6,
    }


def _dense(d: int, block: BlockShape, part: TimedPart) -> Work:
    weights = 3 * d * block.width
    if part == "decode":
        return {"dense weights": weights / 1e6, "dense rows": (2 * block.width + d) / 1e3}
    return {"dense products": PROMPT_READ * weights / 1e8, "dense values": PROMPT_READ * block.width / 1e6}


def _sparse(d: int, block: BlockShape, part: TimedPart, how: str) -> Work:
    routed, shared = 3 * d * block.width, 3 * d * block.shared
    rows = PROMPT_READ * block.top_k
    if part == "decode":
        amounts = {
            "blocks": 1.0,
            "with a shared expert": float(block.shared > 0),
            "experts": block.experts / 10,
            "routed weights": block.top_k * routed / 1e6,
            "routed rows": block.top_k * (2 * block.width + d) / 1e3,
            "shared weights": shared / 1e6,
            "shared rows": (2 * block.shared + d * (block.shared > 0)) / 1e3,
        }
    else:
        amounts = {
            "blocks": 1.0,
            "experts": block.experts / 10,
            "routed products": rows * routed / 1e8,
            "routed rows": rows * d / 1e6,
            "routed values": rows * block.width / 1e6,
            "routed weights": block.experts * routed / 1e6,
            "shared products": PROMPT_READ * shared / 1e8,
            "shared values": PROMPT_READ * block.shared / 1e6,
        }
    return {f"{how}: {name}": amount for name, amount in amounts.items()}
