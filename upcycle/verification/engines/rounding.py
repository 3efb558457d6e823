"""What an engine wrote, beside what stock transformers would have written in its place."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from upcycle.verification.engines.engine import Written
from upcycle.verification.verdict import EXACT_TOLERANCE


@dataclass(frozen=True)
class Place:
    """One token of one text. ``expected`` is transformers' most probable one there, ``margin`` how far its logit is above that of
    the engine's token ``found``, ``allowed`` the margin that rounding can explain, ``gap_error`` by how much the distance of the
    engine's two best logits is another than transformers' (0 where it does not say, infinite where
    it says NaN).
    """

    prompt: int
    position: int
    expected: int
    found: int
    margin: float
    allowed: float
    gap_error: float


def places(model: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Written], tolerance: float) -> Iterator[Place]:
    """Every token that the engine wrote: transformers reads the engine's text, so that each stands for itself.

    Up to the first difference that is greedy writing of both; after it, both go on from the engine's.

    Rounding: if logits ``z [V]`` are off by ``tolerance`` relative to their norm, spread like noise over all of them, the
    largest single error is about ``tolerance * rms(z) * sqrt(2 ln V)`` (the maximum of V normal numbers); two of them can add
    up. ``z`` is centred: a constant changes no probability.
    """
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        logits = _logits(model, prompt, text.tokens).float()
        centred = logits - logits.mean(-1, keepdim=True)
        spread = math.sqrt(2 * math.log(logits.shape[-1]))
        allowed = 2 * tolerance * spread * centred.square().mean(-1).sqrt()
        for position, (token, rivals) in enumerate(zip(text.tokens, text.rivals, strict=True)):
            z = logits[position]
            best = int(z.argmax())
            yield Place(
                prompt=index,
                position=position,
                expected=best,
                found=token,
                margin=float(z[best] - z[token]),
                allowed=float(allowed[position]),
                gap_error=_gap_error(z, rivals),
            )


def _gap_error(z: torch.Tensor, rivals: tuple[int, int, float] | None) -> float:
    if rivals is None:
        return 0.0
    a, b, gap = rivals
    return math.inf if math.isnan(gap) else abs(gap - float(z[a] - z[b]))


def tolerance_of(model: Any, exact: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Written]) -> float:
    """Twice the relative error of ``model``'s logits, which computes in the engine's dtype: the engine rounds in its own way, as
    often. In fp32 (``model`` is None) it is what is promised of an exact conversion.
    """
    if model is None:
        return EXACT_TOLERANCE
    error = norm = 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        rounded, reference = (_logits(one, prompt, text.tokens).double() for one in (model, exact))
        error += float((rounded - reference).square().sum())
        norm += float(reference.square().sum())
    return 2 * math.sqrt(error / norm)


@torch.no_grad()
def _logits(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """Logits ``[T, V]`` from which each of the tokens was chosen."""
    ids = torch.tensor([[*prompt, *tokens]], device=model.device)
    last = len(tokens) + 1  # of a long prompt there would be gigabytes of logits
    logits: torch.Tensor = model(ids, use_cache=False, logits_to_keep=last).logits[0, -last:-1]
    return logits
