"""A text that shows what depends on positions stays within what all compared models read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import upcycle
from upcycle.text.reach import Reach, reach_of


def config(context: int, **rope: Any) -> Any:
    return SimpleNamespace(max_position_embeddings=context, rope_parameters=rope)


def test_a_border_counts_within_the_context_of_all() -> None:
    long = config(512, rope_type="yarn", original_max_position_embeddings=128)
    assert reach_of(long, long) == Reach(128, 144)
    assert reach_of(long, config(136)) == Reach(128, 136)
    assert reach_of(long, config(128)) == Reach(0, 0)


def test_scores_that_grow_are_left_to_the_first_length(pico: Callable[[str], Path], tmp_path: Path) -> None:
    result = upcycle.convert(
        str(pico("ministral3")), tmp_path / "out", experts=2, verification={"tokens": 400}, tokenizer="none"
    )
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert any("up to position 128" in warning for warning in result.plan.warnings)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["max_position_embeddings"] == 128
    assert "llama_4_scaling_beta" not in written["rope_parameters"]
