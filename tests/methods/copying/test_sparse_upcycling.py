"""Sparse upcycling with its knobs: noise, both gate conventions, half of the layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.errors import RefusalError, UsageError

EXACT = 1e-13  # a few hundred fp64 products of order one
QUICK: dict[str, Any] = {"experts": 4, "verification": {"tokens": 128}}


def test_copies_weighted_by_a_sum_of_one_are_the_dense_ffn(make: Callable, x: np.ndarray) -> None:
    layer = make("sparse_upcycling", experts=4, top_k=2)
    for e in range(4):
        assert all(map(np.array_equal, layer.expert(e), layer.dense))
    assert layer.error(x) < EXACT


def test_softmax_weights_shrink_the_output_by_their_sum(make: Callable, x: np.ndarray) -> None:
    layer = make("sparse_upcycling", experts=4, top_k=2, gate="softmax")
    whole = make("sparse_upcycling", experts=4, top_k=4, gate="softmax")
    assert whole.error(x) < EXACT
    assert whole.method.inexact(whole.shape, 1.0) is None
    for token in x:
        kept = sum(layer.weights(token).values())
        assert kept < 1
        assert np.allclose(layer.output(token), kept * whole.output(token), rtol=1e-12, atol=1e-13)


def test_noise_is_relative_to_each_matrix_and_another_for_each_expert(make: Callable) -> None:
    layer = make("sparse_upcycling", experts=4, noise=0.25)
    noises = []
    for e in range(4):
        for name, matrix, dense in zip(("gate", "up", "down"), layer.expert(e), layer.dense, strict=True):
            rows, dense_rows = (matrix.T, dense.T) if name == "down" else (matrix, dense)
            noises.append((rows - dense_rows) / np.sqrt(np.mean((dense - dense.mean()) ** 2)))
    flat = np.stack([noise.flatten() for noise in noises])
    # 12 * 192 normal numbers: sample mean and deviation are within four standard errors.
    assert abs(flat.mean()) < 4 * 0.25 / np.sqrt(flat.size)
    assert flat.std() == pytest.approx(0.25, rel=4 / np.sqrt(2 * flat.size))
    assert kstest(flat.flatten() / 0.25, "norm").pvalue > 1e-3
    # Correlations of independent samples of 192 have a standard error of 1/sqrt(192).
    assert np.abs(np.corrcoef(flat) - np.eye(12)).max() < 5 / np.sqrt(192)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("name", "target"), [("llama", "qwen2_moe"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe")])
def test_softmax_gate_end_to_end(name: str, target: str, pico: Callable[[str], Path], tmp_path: Path) -> None:
    gate = {"parameters": {"gate": "softmax"}}
    result = upcycle.convert(str(pico(name)), tmp_path / "out", top_k=2, **gate, **QUICK)
    assert result.verification is not None
    assert (result.verification.verdict, result.plan.target) == ("approximate", target)
    assert "gate=softmax: what the 2 chosen of 4 experts weigh together differs" in result.verification.explanation
    assert "about 0.5 before training" in result.verification.explanation
    assert result.verification.all_experts_error is not None
    assert result.verification.all_experts_error < 1e-6
    assert json.loads((tmp_path / "out" / "config.json").read_text())["norm_topk_prob"] is False
    # With all experts on, softmax weights sum to 1 as they are.
    whole = upcycle.convert(str(pico(name)), tmp_path / "all", top_k=4, **gate, **QUICK)
    assert whole.verification is not None
    assert whole.verification.verdict == "exact"


@pytest.mark.long
def test_noise_end_to_end(pico: Callable[[str], Path], tmp_path: Path) -> None:
    errors = []
    for noise in (0.01, 0.1):
        result = upcycle.convert(str(pico("llama")), tmp_path / f"{noise}", parameters={"noise": noise}, **QUICK)
        assert result.verification is not None
        assert result.verification.verdict == "approximate"
        assert f"noise of {noise}" in result.verification.explanation
        assert result.verification.all_experts_error is None
        errors.append(result.verification.relative_logit_error)
    assert 0 < errors[0] < errors[1]
    again = upcycle.convert(
        str(pico("llama")), tmp_path / "again", blueprint=tmp_path / "0.1" / "blueprint.safetensors", **QUICK
    )
    assert again.plan.promise == "approximate"
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("0.1", "again"))
    assert one == two


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("layers", "dense"), [("last-half", [0, 1]), ("every-other", [0, 2]), ([0], [1, 2])])
def test_half_of_the_layers(layers: Any, dense: list[int], pico: Callable[[str], Path], tmp_path: Path) -> None:
    result = upcycle.convert(str(pico("qwen3")), tmp_path / "out", layers=layers, **QUICK)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mlp_only_layers"] == dense
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.mlp_only_layers == dense


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parameters": {"noise": -0.1}}, "key 'noise'"),
        ({"parameters": {"gate": "sigmoid"}}, "key 'gate'"),
        ({"shared": 1}, "no shared experts"),
    ],
)
def test_bad_input(keys: dict, message: str, pico: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=message):
        upcycle.plan(str(pico("llama")), **keys)


def test_a_target_without_the_flag_is_refused(pico: Callable[[str], Path]) -> None:
    with pytest.raises(RefusalError, match="always makes the chosen experts' weights sum to 1"):
        upcycle.plan(str(pico("llama")), target="mixtral", parameters={"gate": "softmax"})
