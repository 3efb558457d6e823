"""Zeros inside experts: both papers' algorithms in another way, fp64; and what is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import upcycle
from upcycle.errors import UsageError
from upcycle.methods.compressing.inside.masks import sparse_gpt, wanda

SAME = 1e-9  # inverses of matrices of condition numbers below 1e4
KEYS: dict[str, Any] = {
    "method": "sparse_experts",
    "calibration": {"text": "demo", "tokens": 512, "window": 32},
    "verification": {"tokens": 64},
}


def inputs(columns: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix, inputs that depend on one another, and their damped products."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, columns)) @ (np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)))
    gram = x.T @ x
    return rng.standard_normal((5, columns)), x, gram + 0.01 * gram.trace() / columns * np.eye(columns)


@pytest.mark.parametrize("grouped", [False, True])
def test_wanda_is_weight_times_the_norm_of_its_input(grouped: bool) -> None:
    weight, x, damped = inputs()
    found = wanda(torch.tensor(weight), torch.tensor(x.T @ x), 0.5, grouped).numpy()
    for row, made in zip(weight, found, strict=True):
        scores = np.abs(row) * np.sqrt(np.diag(damped))
        sets = [range(first, first + 4) for first in range(0, 12, 4)] if grouped else [range(12)]
        kept = {int(i) for own in sets for i in sorted(own, key=lambda i: -scores[i])[: len(own) // 2]}
        np.testing.assert_array_equal(made, [row[i] if i in kept else 0.0 for i in range(12)])


@pytest.mark.parametrize("grouped", [False, True])
def test_sparse_gpt_is_the_surgeon_that_only_changes_what_is_behind(grouped: bool) -> None:
    """Weight i goes: those behind change by -w_i [H^-1]_ii^-1 [H^-1]_i:, with H of the columns from i on alone."""
    weight, x, damped = inputs()
    expected = weight.copy()
    step = 4 if grouped else 12
    for first in range(0, 12, step):
        own = range(first, first + step)
        saliency = np.stack([expected[:, i] ** 2 / np.linalg.inv(damped[i:, i:])[0, 0] for i in own], 1)
        if grouped:
            gone = {(row, first + int(i)) for row in range(5) for i in np.argsort(saliency[row])[:2]}
        else:
            gone = {(int(i) // step, int(i) % step) for i in np.argsort(saliency.ravel())[:30]}
        for i in own:
            inverse = np.linalg.inv(damped[i:, i:])
            for row in range(5):
                if (row, i) in gone:
                    expected[row, i:] -= expected[row, i] / inverse[0, 0] * inverse[0]
                    expected[row, i] = 0.0
    found = sparse_gpt(torch.tensor(weight), torch.tensor(x.T @ x), 0.5, grouped).numpy()
    np.testing.assert_allclose(found, expected, rtol=SAME, atol=SAME)
    assert ((found == 0) == (expected == 0)).all()
    plain = wanda(torch.tensor(weight), torch.tensor(x.T @ x), 0.5, grouped).numpy()
    assert np.linalg.norm(x @ (found - weight).T) < np.linalg.norm(x @ (plain - weight).T)


def test_an_expert_that_no_token_chose_loses_its_smallest_weights() -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
    for zeroed in (wanda, sparse_gpt):
        assert zeroed(weight, torch.zeros(4, 4), 0.5, True).tolist() == [[0.0, -3.0, 2.0, 0.0]]


def test_two_of_every_four_weights_are_zeros_in_the_file(pico_moe: Callable[..., Path], tmp_path: Path) -> None:
    result = upcycle.convert(str(pico_moe("mixtral")), tmp_path / "out", keep=0.5, **KEYS)
    assert result.plan.refit == "none"
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert result.verification.relative_logit_error > 1e-3
    before = load_file(pico_moe("mixtral") / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in after.items():
        if ".experts." in name:
            assert ((tensor.unflatten(1, (-1, 4)) != 0).sum(-1) == 2).all()
        else:
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "which part of the weights"),
        ({"keep": 0.75}, "half of the weights stay"),
        ({"keep": 0.5, "refit": "down"}, "would fill the zeros"),
    ],
)
def test_bad_input_is_one_clear_error(keys: dict[str, Any], said: str, pico_moe: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        upcycle.plan(str(pico_moe("mixtral")), **{**KEYS, **keys})
    assert caught.value.hint
