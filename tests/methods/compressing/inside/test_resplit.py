"""Finer experts: the same function where all of them run, and router rows by the formula, written down again with NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layer_sources import layer_source, random_matrices, random_observations
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.errors import UsageError
from upcycle.ffn.ridge_sums import UNJUDGED_STRENGTH
from upcycle.methods.compressing.inside.resplit import Resplit, ResplitParameters, own_rows
from upcycle.methods.compressing.layer_source import ExpertTokens

Models = Callable[..., Path]
TEXT: dict[str, Any] = {"text": "demo", "tokens": 512, "window": 32}
KEYS: dict[str, Any] = {"method": "resplit", "calibration": TEXT, "verification": {"tokens": 64}}
SAME = 1e-5  # fp32 weights: sums over more experts, in another order


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return torch.as_tensor(model(torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))).logits)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "qwen2_moe-softmax",
        pytest.param("lfm2_moe", marks=pytest.mark.long),
        pytest.param("granitemoe", marks=pytest.mark.long),
    ],
)
def test_where_all_finer_experts_run_it_is_the_same_function(name: str, pico_moe: Models, tmp_path: Path) -> None:
    out, parameters = tmp_path / "out", {"pieces": 2, "sharpness": 0.0}
    upcycle.convert(str(pico_moe(name)), out, keep=1, refit="none", parameters=parameters, **KEYS)
    expected = logits(pico_moe(name))
    assert torch.dist(logits(out), expected) <= SAME * torch.linalg.norm(expected)
    model = AutoModelForCausalLM.from_pretrained(out)
    blocks = [module for module_name, module in model.named_modules() if module_name.endswith(".experts")]
    assert all(len(block.down_proj) == 8 for block in blocks)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_own_rows_are_the_ridge_regression_of_centred_logarithms() -> None:
    x, norms = drawn(60, 5), drawn(60, 3, seed=1).abs() + 0.1
    seen = ExpertTokens(x, torch.zeros(60, 1), torch.ones(60), torch.zeros(60, dtype=torch.bool))
    logs = np.log(norms.double().numpy())
    targets, own = logs - logs.mean(1, keepdims=True), x.double().numpy()
    ridge = UNJUDGED_STRENGTH * (own**2).sum() / 5  # nothing was held out to choose a strength by
    expected = np.linalg.solve(own.T @ own + ridge * np.eye(5), own.T @ targets).T
    np.testing.assert_allclose(own_rows(seen, norms).numpy(), expected, atol=1e-12)


def test_rows_that_do_not_help_on_held_out_tokens_are_zeros() -> None:
    x, norms = drawn(80, 30), drawn(80, 3, seed=1).abs() + 0.1  # noise
    held = torch.arange(80) >= 40
    seen = ExpertTokens(x, torch.zeros(80, 1), torch.ones(80), held)
    found = own_rows(seen, norms)
    learnt = own_rows(seen, (x @ drawn(30, 3, seed=2)).exp())
    assert learnt.abs().max() > 0.1
    assert not found.any() or found.abs().max() < learnt.abs().max() / 4
    nobody = ExpertTokens(x[:0], torch.zeros(0, 1), torch.ones(0), held[:0])
    assert not own_rows(nobody, norms[:0]).any()


def test_router_rows_are_those_of_the_expert_and_sharpness_times_its_own() -> None:
    method = Resplit(ResplitParameters(pieces=2, sharpness=0.5))
    matrices = random_matrices(width=16, hidden=7)
    cut = method._cut(3, [method._groups(0, matrices(e), 0) for e in range(3)], 1.0)
    assert cut.rows == (0, 0, 1, 1, 2, 2)
    orders = [list(terms[0].order or ()) for terms in cut.experts]
    assert all(sorted(orders[i] + orders[i + 1]) == [*range(16)] for i in (0, 2, 4))
    x, rows = drawn(40, 7), drawn(3, 7, seed=3)

    def tokens(expert: int) -> ExpertTokens:
        return ExpertTokens(x, drawn(40, 16, seed=expert), torch.ones(40), torch.zeros(40, dtype=torch.bool))

    router = method.made(cut, 2, rows, tokens, matrices)["router"]
    for place, expert in enumerate(cut.rows):
        down, both = matrices(expert)["down"], orders[2 * expert : 2 * expert + 2]
        norms = torch.stack([(tokens(expert).hidden[:, own] @ down[:, own].T).norm(dim=1) for own in both], 1)
        own = own_rows(tokens(expert), norms)[place % 2]
        torch.testing.assert_close(router[place], (rows[expert].double() + 0.5 * own).float())


def test_one_layer_is_split_as_in_the_whole_model() -> None:
    method = Resplit(ResplitParameters(pieces=2))
    source = layer_source(random_observations(4), random_matrices(width=16))
    cut = method.cut(source, 2)
    assert len(cut.experts) == 8
    assert cut.scale == 1.0  # two of four run, in the place of two


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "which part of the neurons"),
        ({"keep": 0.5, "parameters": {"pieces": 5}}, "cannot be divided into 5"),
        ({"keep": 0.99}, "of 4 finer experts per token is 4"),
    ],
)
def test_bad_input_is_one_clear_error(keys: dict[str, Any], said: str, pico_moe: Models) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        upcycle.plan(str(pico_moe("mixtral")), **KEYS, **keys)
    assert caught.value.hint
