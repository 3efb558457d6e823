"""The numbers and the verdict of a verification: sums over tokens, what is computed from them, and how they are written.

Nothing here divides zero by zero, and nothing that is written is NaN or infinite: JSON has neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax

from upcycle.notebook import HtmlShown

EXACT_TOLERANCE = 1e-5
MUCH_WORSE = 1.25  # times the loss of quality on text of the kinds that were calibrated on
LOGITS, STATES = "logits", "hidden states"  # what two models are compared by


@dataclass(frozen=True)
class Verification(HtmlShown):
    """Holds what was promised, what was measured, and the verdict. ``as_dict`` has the documented JSON keys.

    Errors are relative: ``||moe - dense|| / ||dense||`` over all tokens; 0 where both are zero, and infinite (null in JSON)
    where the dense side alone is. ``layer_errors`` are those of each block on the inputs of the dense model's FFNs.
    ``all_experts_error`` is the largest error of a layer with every expert active, measured where fewer are used, against
    ``all_experts_reference``: the dense FFN, or where several models are mixed, the mean of the sources' FFNs. ``kl`` is the mean
    KL(dense || moe) of next-token distributions in nats, ``loss`` the mean cross entropy of the next token in nats, and
    ``perplexity`` its exponential: infinite (null) from 710 nats on.

    The dense side is ``reference``, its weights as they are stored. Where the conversion's dtype changes them, the promise is
    equality with the rounded model, and layers are compared with that model, too; ``rounding_error`` is the error of rounding
    alone, and ``tolerance`` includes it. ``positions`` is the length of the longest text that was read. Beyond
    ``positions_needed`` (0: nowhere), attention windows and scaled positions matter, and ``far_error`` is the relative error of
    the logits there (None: not measured).

    ``unseen`` has the ``tokens``, ``perplexity_dense`` and ``perplexity`` of embedded text of a kind that was not calibrated on
    (None: nothing was calibrated, the model is exact, or this kind was calibrated on, too).

    ``neurons_run`` has for every MoE layer of the wrapper the mean of the neurons that ran for a token, over those of the dense FFN
    (empty: another architecture, whose number is fixed).

    Of a model of parts, ``media_error`` is the relative error of the logits of a text with a random image or sound (None: not
    measured), and ``media`` says what was read, or why nothing was.

    Of an encoder, the hidden states behind the last layer take the place of logits: ``compared`` says which it was. It has no KL,
    losses and perplexity (null), and ``cosine``, the mean cosine between both models' states of a token (None: of logits). Its
    ``unseen`` has ``tokens``, ``relative_error`` and ``cosine``.

    For a growth step, the fields named dense describe its source. ``compared_tensors`` is the number of tensors that equal the
    source's bit for bit, or what the step is declared to make of them: all of them. There are no layer errors.
    """

    verdict: Literal["exact", "approximate", "broken"]
    explanation: str
    promise: str
    relative_logit_error: float
    tolerance: float | None
    max_logit_difference: float
    kl: float
    top1_agreement: float
    perplexity_dense: float
    perplexity: float
    loss_dense: float
    loss: float
    layer_errors: list[float]
    all_experts_error: float | None
    all_experts_reference: str
    tokens: int
    text: str
    streamed: bool
    compared_tensors: int = 0
    reference: str = ""
    rounding_error: float | None = None
    positions: int = 0
    positions_needed: int = 0
    far_error: float | None = None
    unseen: dict[str, Any] | None = None
    media_error: float | None = None
    media: str = ""
    compared: str = LOGITS
    neurons_run: list[float] = field(default_factory=list)
    cosine: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``; numbers that are not finite are null."""
        content: dict[str, Any] = json_numbers(asdict(self))
        return content


def unseen_ratio(check: Mapping[str, Any]) -> float | None:
    """Return how many times the dense perplexity the model has on text of a kind that was not calibrated on.

    ``check`` is :meth:`Verification.as_dict`. None: that was not measured, or is not finite.
    """
    found = check.get("unseen") or {}
    before, after = found.get("perplexity_dense"), found.get("perplexity")
    return after / before if before and after else None


def overfitted(check: Mapping[str, Any]) -> bool:
    """Return whether a model loses much more on text of a kind that was not calibrated on; ``check`` as above."""
    ratio, before, after = unseen_ratio(check), check["perplexity_dense"], check["perplexity"]
    return ratio is not None and bool(before and after) and ratio > MUCH_WORSE * max(1.0, after / before)


def json_numbers(value: Any) -> Any:
    """Return the same plain data with None in place of every number that is not finite, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: json_numbers(inner) for key, inner in value.items()}
    return [json_numbers(inner) for inner in value] if isinstance(value, list | tuple) else value


def said(value: float | None, form: str) -> str:
    """Return a number as text; ``not finite`` for None and for what is not finite."""
    return "not finite" if value is None or not math.isfinite(value) else format(value, form)


def span(values: list[float] | list[float | None]) -> str:
    """Return the range of some errors as text, from the smallest to the largest; errors that are not finite are counted."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    inside = f"{min(known):.1e} to {max(known):.1e}" if known else ""
    unknown = f"{len(values) - len(known)} not finite" if len(known) < len(values) else ""
    return ", ".join(part for part in (inside, unknown) if part)


def relative(error: float, norm: float) -> float:
    """Return the root of ``error / norm``, two sums of squares: 0 where both are 0, infinite where ``norm`` alone is."""
    if norm == 0:
        return error if error == 0 or math.isnan(error) else math.inf
    return math.sqrt(error / norm)


def perplexity_of(loss: float) -> float:
    """Return ``exp(loss)``; infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Totals:
    """Sums differences, KL, losses and agreement over tokens, in fp64; of an encoder's states, the differences alone."""

    def __init__(self, states: bool = False) -> None:
        self.of_logits = not states
        self.error = self.norm = self.kl = self.loss_dense = self.loss = self.cosines = 0.0
        self.largest = 0.0
        self.agreeing = self.tokens = self.states = self.predictions = 0

    def add(self, ids: torch.Tensor, dense: torch.Tensor, moe: torch.Tensor) -> None:
        """Add the comparison of two sets of fp32 logits ``[N, T, V]`` for token ids ``[N, T]``, or of states ``[N, T, d]``.

        Of images, ``ids`` are these themselves, ``[N, C, H, W]``, or the seeds of random ones, ``[N, 1]``.
        """
        difference = moe - dense
        self.error += difference.double().square().sum().item()
        self.norm += dense.double().square().sum().item()
        largest = difference.abs().max().item()
        if math.isnan(largest) or largest > self.largest:  # once it is NaN, nothing is larger
            self.largest = largest
        if not self.of_logits:
            self.tokens += ids.numel() if ids.dim() == 2 else len(ids)
            self.states += dense.shape[0] * dense.shape[1]
            self.cosines += cosine_similarity(moe.double(), dense.double(), dim=-1).sum().item()
            return
        self.agreeing += int((moe.argmax(-1) == dense.argmax(-1)).sum())
        self.tokens += ids.numel()
        p, q = log_softmax(dense, -1), log_softmax(moe, -1)
        self.kl += kl_div(q, p, log_target=True, reduction="sum").item()
        targets = ids[:, 1:].flatten()
        self.loss_dense += cross_entropy(p[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        self.loss += cross_entropy(q[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        self.predictions += targets.numel()

    @property
    def relative_error(self) -> float:
        """``||moe - dense|| / ||dense||``."""
        return relative(self.error, self.norm)

    @property
    def fault(self) -> str | None:
        """The reason why the verdict must be broken, as some logits are not finite; None: they are all finite."""
        if not math.isfinite(self.norm):
            return "the logits of the dense side are not finite in fp32: there is nothing to compare with"
        if not math.isfinite(self.error):
            return "the logits are not finite"
        return None

    @property
    def remark(self) -> str:
        """A remark on the numbers, to append to an explanation; empty where there is nothing to remark."""
        return "" if self.norm else "; every logit of the dense side is zero"

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers by the names that :class:`Verification` has for them."""
        if not self.of_logits:
            none = dict.fromkeys(
                ("kl", "top1_agreement", "perplexity_dense", "perplexity", "loss_dense", "loss"), math.nan
            )
            found = {
                "relative_logit_error": self.relative_error,
                "max_logit_difference": self.largest,
                "tokens": self.tokens,
                "cosine": self.cosines / max(1, self.states),
            }
            return {**found, **none, "compared": STATES}
        loss_dense, loss = (total / max(1, self.predictions) for total in (self.loss_dense, self.loss))
        return {
            "relative_logit_error": self.relative_error,
            "max_logit_difference": self.largest,
            "kl": 0.0 if self.kl < 0 else self.kl / self.tokens,
            "top1_agreement": self.agreeing / self.tokens,
            "perplexity_dense": perplexity_of(loss_dense),
            "perplexity": perplexity_of(loss),
            "loss_dense": loss_dense,
            "loss": loss,
            "tokens": self.tokens,
        }
