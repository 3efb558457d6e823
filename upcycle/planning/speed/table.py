"""The committed table of measured times, and what was fitted to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from upcycle.files.formats.parsing import read_json
from upcycle.planning.speed.work import HOWS, TIMED_PARTS, BlockShape, ModelShape, TimedPart

# By the dtype of weights and states; 16-bit ones were timed on a CPU that multiplies them itself.
TABLES = {"float32": Path(__file__).with_name("cpu.json"), "bfloat16": Path(__file__).with_name("cpu_bfloat16.json")}


@dataclass(frozen=True)
class MeasuredModel:
    """One measured model: its shape, how its sparse blocks were computed (any way, if it has none), and milliseconds.

    ``parent`` is the shape of the dense model that it was timed beside.
    """

    shape: ModelShape
    parent: ModelShape
    how: str
    milliseconds: Mapping[TimedPart, float]

    @property
    def ffn(self) -> int:
        """The width of the dense model's FFNs."""
        ((block, _),) = self.parent.blocks
        return block.width

    @property
    def sparse(self) -> bool:
        """Whether it has experts."""
        return any(block.experts for block, _ in self.shape.blocks)


@cache
def committed(dtype: str = "float32") -> dict[str, Any]:
    """Return the content of the table of a dtype that comes with the package."""
    return read_json(TABLES[dtype])


def measurements(table: Mapping[str, Any]) -> Iterator[MeasuredModel]:
    """Yield all models of a table."""
    for size in table["sizes"]:
        hidden, heads, ffn = size["hidden"], tuple(size["heads"]), size["ffn"]
        for row in size["models"]:
            layers, vocabulary = row["layers"], row["vocabulary"]
            block = (
                BlockShape(row["width"], row["experts"], row["top_k"], row["shared"])
                if "experts" in row
                else BlockShape(row["ffn"])
            )
            shape, parent = (ModelShape(hidden, heads, vocabulary, ((b, layers),)) for b in (block, BlockShape(ffn)))
            for how in ("dense", *HOWS):
                if how in row:
                    yield MeasuredModel(shape, parent, how, dict(zip(TIMED_PARTS, row[how], strict=True)))
