"""Compares what an engine generated with what stock transformers would have generated, and tells what rounding explains."""

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
    """Holds the comparison of one generated token.

    Attributes:
        prompt: the index of the prompt.
        position: the index of the token after the prompt.
        expected: the most probable token in transformers.
        found: the engine's token.
        margin: how much larger the logit of ``expected`` is than that of ``found``.
        allowed: the largest margin that rounding can explain.
        gap_error: by how much the gap between the engine's two best logits differs from that in transformers; 0 where the engine
            does not tell, infinite where it computes NaN.
    """

    prompt: int
    position: int
    expected: int
    found: int
    margin: float
    allowed: float
    gap_error: float


def places(model: Any, prompts: Sequence[Sequence[int]], texts: Sequence[Written], tolerance: float) -> Iterator[Place]:
    """Yield the comparison of every token that the engine generated.

    Transformers reads the engine's text, so that each token is compared given the same tokens before it.

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
    """Return the relative error of logits that rounding in the engine's dtype can explain.

    It is twice the error of ``model``, which computes in that dtype, relative to ``exact``, since the engine rounds in other places
    but as often. For fp32, where ``model`` is None, it is the tolerance of an exact conversion.
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
    """Return the logits ``[T, V]`` from which each of the tokens was chosen."""
    ids = torch.tensor([[*prompt, *tokens]], device=model.device)
    last = len(tokens) + 1  # of a long prompt there would be gigabytes of logits
    logits: torch.Tensor = model(ids, use_cache=False, logits_to_keep=last).logits[0, -last:-1]
    return logits
