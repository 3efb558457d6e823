"""Windows of long texts: chosen before they are tokenised."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from upcycle.architectures.stock import load_tokenizer
from upcycle.text import mixture
from upcycle.text.mixture import mixed_windows
from upcycle.text.windows import demo_parts

WINDOW = 32


def test_a_long_text_is_tokenised_where_its_windows_lie(
    pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, text = load_tokenizer(pico("llama")), demo_parts("prose")[0]
    monkeypatch.setattr(mixture, "_LONG", 1000)
    monkeypatch.setattr(mixture, "encode", lambda *_: pytest.fail("tokenised whole"))
    found = mixed_windows({"prose": text}, tokenizer, 6 * WINDOW, WINDOW)
    assert found.shape == (6, WINDOW)
    places = [text.find(tokenizer.decode(row)) for row in found]
    assert all(place == 0 or text[place - 1] == "\n" for place in places), "each begins with a line"
    assert places == sorted(places)
    steps = [b - a for a, b in pairwise(places)]
    assert min(steps) > len(text) / 12, "they are evenly spread"


def test_a_long_text_of_few_tokens_is_tokenised_whole(
    pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, text = load_tokenizer(pico("llama")), demo_parts("prose")[0]
    monkeypatch.setattr(mixture, "_LONG", 1000)
    monkeypatch.setattr(mixture, "_CHARACTERS_PER_TOKEN", 1)  # no segment holds a window
    segments = mixed_windows({"prose": text}, tokenizer, 6 * WINDOW, WINDOW)
    monkeypatch.undo()
    assert segments.equal(mixed_windows({"prose": text}, tokenizer, 6 * WINDOW, WINDOW))


@pytest.mark.parametrize("length", [1, 1000])
def test_fewer_tokens_than_a_window_are_one_window(
    pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Of a text that is tokenised whole, and of one that is not."""
    tokenizer, text = load_tokenizer(pico("llama")), demo_parts("prose")[0]
    monkeypatch.setattr(mixture, "_LONG", length * len(text))
    assert mixed_windows({"prose": text}, tokenizer, WINDOW // 2, WINDOW).shape == (1, WINDOW)
