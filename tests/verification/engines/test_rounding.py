"""What rounding explains of a difference, and what it does not."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from upcycle.verification.engines.engine import Written
from upcycle.verification.engines.rounding import places, tolerance_of
from upcycle.verification.verdict import EXACT_TOLERANCE


class Fixed:
    """A "model" whose logits at position ``i`` are row ``i`` of ``rows``."""

    device = torch.device("cpu")

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __call__(self, ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        assert not use_cache
        return SimpleNamespace(logits=self.rows[None, : ids.shape[1]])


def test_every_token_is_judged_by_the_logits_it_was_chosen_from() -> None:
    """With loops in fp64: the prompt's last position chooses the first token, and what rounding allows is the formula's."""
    torch.manual_seed(1)
    rows = torch.randn(6, 50)
    prompt, tokens = [3, 4, 5], [9, 8, 7]
    rivals = [(1, 2, 0.5), None, (0, 49, -0.25)]
    found = list(places(Fixed(rows), [prompt], [Written(tokens, rivals)], 1e-3))
    assert [place.position for place in found] == [0, 1, 2]
    for i, place in enumerate(found):
        z = [float(value) for value in rows[len(prompt) - 1 + i].double()]
        mean = sum(z) / len(z)
        rms = math.sqrt(sum((value - mean) ** 2 for value in z) / len(z))
        assert place.expected == z.index(max(z))
        assert place.found == tokens[i]
        assert place.margin == pytest.approx(max(z) - z[tokens[i]], abs=1e-6)
        assert place.allowed == pytest.approx(2 * 1e-3 * rms * math.sqrt(2 * math.log(50)), rel=1e-5)
        two = rivals[i]
        expected = abs(two[2] - (z[two[0]] - z[two[1]])) if two else 0.0
        assert place.gap_error == pytest.approx(expected, abs=1e-6)


def test_noise_of_the_tolerated_size_stays_within_what_is_allowed() -> None:
    """Of noise of relative size ``tolerance`` even the two worst of 5,000 logits move by more in few rows at most: the largest of
    V normal numbers is above sqrt(2 ln V) with a probability below 1 / sqrt(4 pi ln V), here 0.1. Ten times the size always does.
    """
    torch.manual_seed(0)
    exact = torch.randn(40, 5000, dtype=torch.float64) * 3
    for factor, least, most in ((1, 36, 40), (10, 0, 0)):
        noise = torch.randn_like(exact)
        noise *= factor * 1e-3 * exact.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        other = exact + noise
        low, high = noise.argmin(-1), noise.argmax(-1)
        gaps = (other.gather(1, high[:, None]) - other.gather(1, low[:, None]))[:, 0]
        rivals = [(int(a), int(b), float(gap)) for a, b, gap in zip(high, low, gaps, strict=True)]
        text = Written([int(row.argmax()) for row in other], rivals)
        model = Fixed(torch.cat([exact, exact[:1]]))
        found = list(places(model, [[0]], [text], 1e-3))
        assert least <= sum(place.gap_error <= place.allowed for place in found) <= most


def test_the_tolerance_in_16_bits_is_twice_the_models_own_rounding_error() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    rounded = rows + torch.tensor([[0.3, 0.4], [0.0, 0.0]])
    text = [Written([1], [(1, 0, 1.0)])]
    assert tolerance_of(Fixed(rounded), Fixed(rows), [[0]], text) == pytest.approx(2 * 0.5 / 5)
    assert tolerance_of(None, Fixed(rows), [[0]], text) == EXACT_TOLERANCE
