"""What a conversion will cost, and the arithmetic that plans of all kinds share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from upcycle.architectures.dense.base import DenseConfig
from upcycle.checkpoints.output_layout import Shard
from upcycle.notebook import HtmlShown
from upcycle.recipe.conversion_recipe import parse_size

CALIBRATION_BATCH_TOKENS = 4096
MOST_CACHE_BYTES = 1 << 30  # activations kept between the passes over a layer
REUSED_BYTES = 1 << 28  # freed memory that a calibration holds on to
# Resident set of the interpreter with a CPU build of torch loaded; measured, see tests/benchmarks.
_INTERPRETER_BYTES = 260_000_000
_STOCK_CLASSES = 260_000_000  # transformers' modelling code and what it imports: every conversion asks it first
RESIDENT_BYTES = _INTERPRETER_BYTES + _STOCK_CLASSES  # before a weight is read


@dataclass(frozen=True)
class Plan(HtmlShown):
    """Holds what a conversion will cost and what it promises. ``as_dict`` has the documented JSON keys.

    ``sources`` is empty where there is one source. ``kind`` is the method's. Where the result is not made of
    experts, ``summary`` says what it is: in a growth step, what is copied into what, and in a pruning, how many neurons are kept. In
    a growth step, the fields named dense describe the source, whether it is a MoE or not. ``time`` is what
    :func:`upcycle.planning.speed.predict.predicted_time` returns; None where experts are copies. ``routing`` has the ``rule`` of
    routing, its parameters, and in ``says`` which experts run; None where there are none. Where a rule
    finds for every token how many experts run, all count as active, but by expert choice, which fixes their mean.
    """

    sources: list[dict[str, Any]]
    family: str
    target: str
    method: str
    router: str
    calibration_tokens: int
    refit: str
    promise: str
    promise_reason: str
    parameters_dense: int
    parameters_total: int
    parameters_active: int
    bytes_dense: int
    bytes_output: int
    peak_memory_bytes: int
    flops_per_token_dense: int
    flops_per_token: int
    kind: str = "copies"
    summary: str = ""
    warnings: list[str] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)
    time: dict[str, Any] | None = None
    routing: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return asdict(self)


def files_of(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """Return the entry of a plan for every weight file: its name, its bytes and the names of its units."""
    return [
        {"file": shard.file, "bytes": shard.nbytes, "units": [unit.name for unit in shard.units]} for shard in shards
    ]


def file_warnings(shards: Sequence[Shard], most: str) -> list[str]:
    """Return a warning where a weight file is larger than ``most``, the recipe's ``max_shard_size``; otherwise nothing."""
    largest, wanted = max(shard.nbytes for shard in shards), parse_size(most)
    if largest <= wanted:
        return []
    return [f"the largest file has {largest / 1e9:.1f} GB, above max_shard_size: a layer is never divided"]


def flops_of(dense: DenseConfig, parameters: int) -> int:
    """Return the FLOPs per token: two for each weight that takes part in a matrix product.

    The embedding look-up is no product; a tied embedding counts as the head. Attention over the context is left out: it
    depends on the context's length and is the same before and after.
    """
    embedding = 0 if dense.tie_word_embeddings else dense.vocab_size * dense.hidden_size
    return 2 * (parameters - embedding)


def is_power_of_two(value: float) -> bool:
    """Return whether ``value`` is a power of two, by which every floating-point dtype multiplies exactly (bar overflow)."""
    return value > 0 and math.frexp(value)[0] == 0.5
