"""The widths of a split's experts: what hardware has, what divides the FFN, and what is said where a wish cannot be met."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from upcycle.architectures.dense.llama_like.llama import Llama
from upcycle.architectures.dense_config import DenseConfig
from upcycle.errors import UsageError
from upcycle.planning.job import method_of
from upcycle.planning.split_sizes import least_width, pieces_of, widths, with_sizes
from upcycle.recipe.conversion_recipe import Recipe, parse_recipe

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def sized(size: int = 1536, hidden: int = 576, **keys: Any) -> Recipe:
    """The recipe with its numbers worked out, for an FFN of ``size``."""
    dense: DenseConfig = replace(Llama().config(CONFIG), intermediate_size=size, hidden_size=hidden)
    recipe = parse_recipe({"source": "nowhere", "method": "contiguous_split", "active": 0.5, **keys}, "test")
    return with_sizes(recipe, method_of(recipe), dense)


@pytest.mark.parametrize(
    ("size", "hidden", "width"),
    [
        (1536, 576, 128),
        (5632, 2048, 512),
        (8960, 1536, 640),
        (11008, 4096, 256),
        (14336, 4096, 1024),
        (18944, 3584, 2368),
    ],
)
def test_usual_ffns_get_a_width_that_hardware_has(size: int, hidden: int, width: int) -> None:
    pieces = pieces_of(size, hidden, 12)
    assert size == pieces * width
    assert width % 64 == 0
    assert width >= least_width(hidden)


def test_widths_are_multiples_of_64_or_for_small_models_of_16() -> None:
    assert widths(1536, 1024) == [64, 128, 192, 256, 384]
    assert widths(1536, 1023) == [32, 48, 64, 96, 128, 192, 256, 384]
    assert widths(96, 64) == [8, 16, 24], "too small for any of these: multiples of 8"
    assert widths(97, 64) == []
    assert [pieces_of(1536, 576, about) for about in (1, 5, 24, 192)] == [4, 6, 24, 48]
    assert pieces_of(97, 64, 12) == 12, "padded"
    assert [pieces_of(1536, 576, 12, share) for share in (0.2, 0.1, 0.01)] == [12, 16, 12], (
        "two of them run, if they can"
    )


def test_a_fraction_and_a_width_become_numbers_of_experts() -> None:
    found = sized(width=128)
    assert (found.experts, found.top_k, found.shared, found.active, found.width) == (7, 1, 5, None, None)
    found = sized(width=128, always_on=0.5)
    assert (found.experts, found.top_k, found.shared) == (9, 3, 3)
    found = sized(always_on=0.99)
    assert found.top_k == 1, "one routed expert runs, however little is left to choose"


def test_a_width_that_does_not_divide_names_those_that_do_and_the_cost_of_padding() -> None:
    with pytest.raises(UsageError, match="experts of 120 neurons do not divide an FFN of 1536") as caught:
        sized(width=120)
    assert caught.value.hint is not None
    assert "--width 96 or --width 128" in caught.value.hint
    assert "24 zero neurons per layer (1.6% more)" in caught.value.hint
    padded = sized(width=120, pad=True)
    assert (padded.experts + padded.shared, padded.pad) == (13, True)


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({"width": 512}, "make 3 of an FFN of 1536", "--width 384"),
        ({"width": 96, "active": None}, "active fraction", "--active"),
        ({"width": 2, "size": 98}, "not a multiple of 8", "no width divides 98"),
        ({"width": 304, "size": 1024, "pad": True}, "more than an FFN of 1024 fills", "--width 256"),
        ({"width": 384, "active": 0.3}, "would run", "smaller width"),
    ],
)
def test_a_wish_that_cannot_be_met(keys: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        sized(**keys)
    assert hint in (caught.value.hint or "")


def test_the_guides_table_of_widths_is_what_the_code_does() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "splitting.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| (\d+) \| (\d+) \| ([\d, ]+) \|$", guide, re.MULTILINE)
    assert len(rows) == 7
    for size, hidden, pieces, width, others in rows:
        neurons, hidden_size = int(size.replace(",", "")), int(hidden.replace(",", ""))
        assert pieces_of(neurons, hidden_size, 12) == int(pieces) == neurons // int(width)
        assert widths(neurons, hidden_size) == sorted([int(width), *map(int, others.split(", "))])


@pytest.mark.parametrize("key", ["experts", "top_k", "shared"])
def test_an_active_fraction_and_counts_are_two_answers(key: str) -> None:
    """Neither is left out in silence."""
    with pytest.raises(UsageError, match=f"and so does {key}"):
        sized(**{key: 2})
