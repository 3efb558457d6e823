"""Drop-Upcycling against arXiv 2502.19261: which neurons are re-initialised, and as what; the numbers themselves in test_draws.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.errors import UsageError
from upcycle.methods.copying.base import part_of

F, E = 24, 8
QUICK: dict[str, Any] = {"method": "drop_upcycling", "experts": 4, "verification": {"tokens": 128}}


def by_neuron(matrices: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Gate, up and down with a neuron per row."""
    gate, up, down = matrices
    return [gate, up, down.T]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9, 1.0])
def test_experts_are_those_of_the_formula(ratio: float, together: bool, make: Callable, x: np.ndarray) -> None:
    """New rows are normal with the moments of all that they replace; everything else is the dense FFN's, bit by bit."""
    layer = make("drop_upcycling", ratio=ratio, shared_indices=together)
    dense, sets, drawn = by_neuron(layer.dense), set(), []
    for e in range(E):
        built = by_neuron(layer.expert(e))
        rows_of = [[j for j in range(F) if (m[j] != old[j]).any()] for m, old in zip(built, dense, strict=True)]
        assert {len(rows) for rows in rows_of} == {int(np.floor(ratio * F))}
        assert (len(set(map(tuple, rows_of))) == 1) == (together or ratio == 1)
        sets.add(tuple(map(tuple, rows_of)))
        for rows, matrix, old in zip(rows_of, built, dense, strict=True):
            replaced = old[rows]
            drawn.append(((matrix[rows] - replaced.mean()) / replaced.std()).flatten())
    assert len(sets) == (1 if ratio == 1 else E)  # other neurons in every expert
    z = np.concatenate(drawn)
    # Standard errors of mean and deviation of that many standard normal numbers, four of them.
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    assert abs(z.std() - 1) < 4 / np.sqrt(2 * z.size)
    assert kstest(z, "norm").pvalue > 1e-3
    # No matrix of no expert has the numbers of another: correlations have a standard error of 1 / sqrt(n).
    apart = np.corrcoef(np.stack(drawn)) - np.eye(len(drawn))
    assert np.abs(apart).max() < 5 / np.sqrt(drawn[0].size)
    assert layer.error(x) > 0.1


def test_ratio_zero_is_plain_upcycling(make: Callable, x: np.ndarray) -> None:
    layer = make("drop_upcycling", experts=4, ratio=0.0)
    assert layer.blueprint.draws is None
    assert layer.error(x) < 1e-13  # fp64, a few hundred products of order one


def test_floor_is_taken_of_the_exact_product() -> None:
    assert [part_of(0.29, 100), part_of(0.7, 10), part_of(0.5, 7), part_of(1.0, 3)] == [29, 7, 3, 3]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("name", "dtype"), [("llama", "keep"), ("qwen2", "bfloat16"), ("qwen3", "float16")])
def test_conversions_are_approximate_and_load(
    name: str, dtype: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    result = upcycle.convert(str(pico(name)), tmp_path / "out", dtype=dtype, **QUICK)
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert result.verification.explanation.startswith("50% of every expert's neurons are re-initialised")
    assert result.verification.relative_logit_error > 0.01
    assert result.verification.all_experts_error is None
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    upcycle.convert(str(pico(name)), tmp_path / "two", blueprint=tmp_path / "out" / "blueprint.safetensors", **QUICK)
    one, two = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "two"))
    assert one == two


@pytest.mark.long
def test_ratio_zero_verifies_exact(pico: Callable[[str], Path], tmp_path: Path) -> None:
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", parameters={"ratio": 0}, **QUICK)
    assert result.verification is not None
    assert result.verification.verdict == "exact"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parameters": {"ratio": 1.5}}, "key 'ratio': .* got 1.5"),
        ({"parameters": {"ratio": -0.1}}, "key 'ratio': .* got -0.1"),
        ({"shared": 2}, "no shared experts"),
    ],
)
def test_bad_input(keys: dict, message: str, pico: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=message):
        upcycle.plan(str(pico("llama")), method="drop_upcycling", **keys)
