"""Runs a source and its conversion side by side, and adds up the differences of their logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from upcycle.models.stock_layers import may_round, rounds
from upcycle.models.stock_model import StockModel, source_model
from upcycle.text.reach import MOST_WORK, Reach, reach_of
from upcycle.verification.media import MediaCheck
from upcycle.verification.verdict import Totals, relative, said

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import Checkpoint
    from upcycle.progress import Progress

_LOGIT_BYTES = 1 << 26  # of the fp32 logits of a batch, at most
_IMAGES = 8  # of a batch
LOADED = "stock transformers, from the source's own files"


@dataclass
class Sides:
    """Holds the source as it is stored, and where the conversion's dtype changes its weights, the source in that dtype."""

    plain: StockModel
    rounded: StockModel | None

    @property
    def judge(self) -> StockModel:
        """The model that the result must equal: the source in the result's dtype."""
        return self.rounded or self.plain


def load_sides(checkpoint: Checkpoint, dtype: str, streamed: bool) -> Sides:
    """Load a source with stock transformers, a second time in ``dtype`` where that changes a weight."""
    plain = source_model(checkpoint, None, streamed)
    changes = may_round(checkpoint, dtype) if streamed else rounds(plain.model, checkpoint, dtype)
    return Sides(plain, source_model(checkpoint, dtype, streamed) if changes else None)


@dataclass
class ModelDifference:
    """Holds the difference between a result and its source.

    Attributes:
        totals: compares the result with the source as it is stored.
        conversion: the relative error of the result's logits against the source in the result's dtype.
        rounding: the relative error of the source's logits in that dtype; None: the dtype changes no weight.
        far: the relative error behind the last border of ``reach``; None: not measured.
        reach: the positions from which windows and scaled positions matter.
        positions: the length of the longest text that was read.
        media: the comparison on an image or a sound; None: the model reads none.
    """

    totals: Totals
    conversion: float
    rounding: float | None
    far: float | None
    reach: Reach
    positions: int
    media: MediaCheck | None = None

    @property
    def worst(self) -> float:
        """The larger of the errors that are due to the conversion; NaN if one is."""
        more = [self.far, self.media.error if self.media else None]
        errors = [self.conversion, *(error for error in more if error is not None)]
        return next((error for error in errors if math.isnan(error)), max(errors))

    def allowed(self, tolerance: float | None) -> float | None:
        """Return the largest allowed relative logit error: the tolerance plus the error of rounding the source alone.

        By the triangle inequality, a result within ``tolerance`` of the rounded source is within this of the stored one.
        """
        if tolerance is None or self.rounding is None:
            return tolerance
        return self.rounding + tolerance * (1 + self.rounding)

    @property
    def remarks(self) -> str:
        """Remarks on the numbers, to append to an explanation; empty where there is nothing to remark."""
        text = self.totals.remark
        if self.rounding is not None:
            text += f"; rounding the source's weights alone moves its logits by {said(self.rounding, '.1e')}"
        if self.media is not None and self.media.error is None:
            text += f"; {self.media.what}"
        if self.reach.border >= self.positions:
            text += (
                f"; only the first {self.positions:,} positions were compared, and sliding windows or scaled positions begin at "
                f"{self.reach.border:,}: --tokens {self.reach.length} compares beyond that"
            )
        return text

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers by the names that :class:`~upcycle.verification.verdict.Verification` has for them."""
        return {
            **self.totals.numbers,
            "reference": LOADED,
            "rounding_error": self.rounding,
            "positions": self.positions,
            "positions_needed": self.reach.border,
            "far_error": self.far,
            "media_error": self.media.error if self.media else None,
            "media": self.media.what if self.media else "",
        }


def batch_size(vocab_size: int, ids: torch.Tensor, streamed: bool, media: bool = False) -> int:
    """Return the windows per batch. A streamed model reads every weight once per batch, so that larger ones are worth memory.

    Of images, ``[N, C, H, W]``, or (``media``) of texts with images or sounds, it is a few, as attention's scores are the largest of
    what a batch needs.
    """
    if ids.dim() > 2 or media:
        return _IMAGES * (8 if streamed else 1)
    return max(1, _LOGIT_BYTES * (8 if streamed else 1) // (4 * ids.shape[1] * vocab_size))


def measure_difference(
    sides: Sides,
    result: StockModel,
    ids: torch.Tensor,
    batch: int,
    parameters: int,
    progress: Progress,
    watched: Callable[[StockModel], AbstractContextManager[None]] | None = None,
    given: Mapping[str, torch.Tensor] | None = None,
) -> ModelDifference:
    """Measure how far a result's logits are from its source's.

    Both read ``ids``, and one text that is long enough to pass every attention window, unless that would take too long.

    Args:
        sides: the source.
        result: the converted model.
        ids: the text, token ids ``[N, W]``.
        batch: windows per pass.
        parameters: those of both models, from which the cost of the long text is estimated.
        progress: where to report.
        watched: returns a context inside which the source runs, for what hooks measure there.
        given: the models' arguments ``[N, ...]``, where they are more than ``ids`` tell.
    """
    totals, batches = Totals(sides.plain.gives_states), ids.split(batch)
    against, rounding = _Error(), _Error()
    reach = reach_of(sides.plain.model.config, result.model.config)
    long = (
        given is None
        and ids.shape[1] <= reach.border
        and (reach.work(parameters) <= MOST_WORK or ids.numel() >= reach.length)
    )
    with progress.phase("verifying", 2 * len(batches) + 2 * long):
        for number, some in enumerate(batches):
            own = {name: value[number * batch : (number + 1) * batch] for name, value in (given or {}).items()} or None
            with watched(sides.judge) if watched else nullcontext():
                expected = sides.judge.logits(some, given=own)
            progress.advance()
            found = result.logits(some, given=own)
            stored = sides.plain.logits(some, given=own) if sides.rounded else expected
            totals.add(some, stored, found)
            against.add(found, expected)
            rounding.add(expected, stored)
            progress.advance()
        far = None
        if long:
            text = reach.text(ids)
            expected = sides.judge.logits(text, reach.judged)
            progress.advance()
            behind = _Error()
            behind.add(result.logits(text, reach.judged), expected)
            far = behind.relative
            progress.advance()
    return ModelDifference(
        totals=totals,
        conversion=against.relative,
        rounding=rounding.relative if sides.rounded else None,
        far=far,
        reach=reach,
        positions=reach.length if long else ids.shape[1] if ids.dim() == 2 else 1,  # an image has no positions of text
    )


def measure_losses(
    source: StockModel, result: StockModel, ids: torch.Tensor, batch: int, progress: Progress
) -> dict[str, Any]:
    """Return what both models make of ``ids``, token ids ``[N, W]``, under the names of ``Verification.unseen``.

    These are perplexities, and of encoders the error and the cosine of the states.
    """
    totals, batches = Totals(source.gives_states), ids.split(batch)
    with progress.phase("verifying on other text", len(batches)):
        for some in batches:
            totals.add(some, source.logits(some), result.logits(some))
            progress.advance()
    numbers = totals.numbers
    if source.gives_states:
        return {"tokens": totals.tokens, "relative_error": totals.relative_error, "cosine": numbers["cosine"]}
    return {name: numbers[name] for name in ("tokens", "perplexity_dense", "perplexity")}


class _Error:
    """Sums, in fp64, the squares of differences and of the values that they are relative to."""

    def __init__(self) -> None:
        self._error = self._norm = 0.0

    def add(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        self._error += (found - expected).double().square().sum().item()
        self._norm += expected.double().square().sum().item()

    @property
    def relative(self) -> float:
        return relative(self._error, self._norm)
