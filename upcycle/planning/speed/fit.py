"""Fits how long each amount of work takes to a table of measured times, and says how well that predicts what it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from upcycle.planning.speed.table import MeasuredModel, measurements
from upcycle.planning.speed.work import TIMED_PARTS, TimedPart, milliseconds, work


def fit(measured: Sequence[MeasuredModel], part: TimedPart) -> dict[str, float]:
    """Return the milliseconds of every amount, none negative, that make the sum of squared relative errors least.

    Args:
        measured: models and their times.
        part: of reading a prompt, or of writing a token.
    """
    from scipy.optimize import nnls

    amounts = [work(each.shape, part, each.how) for each in measured]
    names = sorted({name for row in amounts for name in row})
    rows = [
        [row.get(name, 0.0) / each.milliseconds[part] for name in names]
        for row, each in zip(amounts, measured, strict=True)
    ]
    found, _ = nnls(np.array(rows), np.ones(len(rows)))
    return {name: float(f"{value:.4g}") for name, value in zip(names, found, strict=True)}


@dataclass(frozen=True)
class LeftOut:
    """A split's time relative to its dense parent, measured, and predicted from a fit that has not seen it.

    ``without_shape`` is fitted to all models of other shapes, ``without_size`` to all models of other hidden sizes and FFNs.
    """

    measured: MeasuredModel
    part: TimedPart
    ratio: float
    without_shape: float
    without_size: float


def left_out(table: Mapping[str, Any]) -> list[LeftOut]:
    """Predict each split of a table from the other models in it."""
    every, found = list(measurements(table)), []
    for part in TIMED_PARTS:
        dense = {each.shape: each.milliseconds[part] for each in every if not each.sparse}
        without_size = {
            key: fit([each for each in every if _size(each) != key], part) for key in {_size(each) for each in every}
        }
        shapes = {each.shape: each for each in every if each.sparse}
        without_shape = {shape: fit([each for each in every if each.shape != shape], part) for shape in shapes}
        for each in every:
            if each.sparse:
                ratios = [
                    milliseconds(fitted, each.shape, part, each.how) / milliseconds(fitted, each.parent, part, each.how)
                    for fitted in (without_shape[each.shape], without_size[_size(each)])
                ]
                found.append(LeftOut(each, part, each.milliseconds[part] / dense[each.parent], *ratios))
    return found


def _size(measured: MeasuredModel) -> tuple[int, int]:
    """Tell sizes of dense models apart."""
    return measured.parent.hidden, measured.ffn


def errors(left: Sequence[LeftOut]) -> dict[str, dict[str, float]]:
    """Return the median and the worst relative error of both kinds of predictions."""
    found = {}
    for kind in ("without_shape", "without_size"):
        off = [abs(getattr(each, kind) / each.ratio - 1) for each in left]
        found[kind] = {"median": round(median(off), 4), "worst": round(max(off), 4)}
    return found


def refitted(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is committed beside the times of a table: the coefficients of both parts, and the errors."""
    every = list(measurements(table))
    return {"milliseconds": {part: fit(every, part) for part in TIMED_PARTS}, "errors": errors(left_out(table))}
