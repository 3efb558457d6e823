"""A few tokens: the same as the way for many, and the same refusals."""

from __future__ import annotations

import pytest
import torch
from expert_cases import apart, make_weights, random_ids, rounding

from upcycle.errors import UsageError
from upcycle.kernels.cpu import backend, few_tokens, products
from upcycle.kernels.cpu.native import few_rows
from upcycle.kernels.layout.dispatch import RouterChoice, route


@pytest.fixture(params=[False, True], ids=["torch", "compiled"], autouse=True)
def _with_and_without_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(few_rows, "few_rows", lambda: None)
    elif few_rows.few_rows() is None:
        pytest.skip("no C++ compiler")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "gated"), [("stacked", True), ("packed", False), ("stacked", False)])
@pytest.mark.parametrize("large", [False, True])
def test_as_many_tokens_are_computed(
    large: bool, layout: str, gated: bool, dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:  # all matrices are
        for module in (few_tokens, products):
            monkeypatch.setattr(module, "LARGE", 1)
    weights = make_weights(layout, gated, dtype=dtype, hidden=48, width=40)
    for dropped in (False, True):
        ids = random_ids(tokens, 3, 5, seed=tokens)
        x, scores = torch.randn(tokens, 48).to(dtype), torch.rand(tokens, 3)
        if dropped:
            ids[ids == 2] = 5
            ids[-1, 0] = 5
            scores[ids == 5] = torch.nan
            weights.up_of(2).fill_(torch.nan)
        scores = scores.to(torch.float64 if dtype == torch.float64 else torch.float32)
        for given in (scores, None):
            assert few_tokens.suits(weights, RouterChoice(ids))
            flat = None if given is None else given.flatten()
            many, _ = backend.forward(x, weights, route(ids, 5), flat, False)
            found = few_tokens.forward(x, weights, ids, given)
            assert apart(found, many) < rounding(dtype, 88) * (3 if dtype == torch.bfloat16 else 1)
            assert torch.equal(found, few_tokens.forward(x, weights, ids, given))


def test_all_dropped() -> None:
    x = torch.full((2, 12), torch.nan, dtype=torch.float64)
    scores = torch.full((2, 2), torch.nan, dtype=torch.float64)
    assert not few_tokens.forward(x, make_weights(), torch.full((2, 2), 7), scores).any()


def test_what_it_leaves_to_the_other_way() -> None:
    few, many = torch.zeros(2, 2, dtype=torch.long), torch.zeros(100, 2, dtype=torch.long)
    assert few_tokens.suits(make_weights(), RouterChoice(few))
    assert not few_tokens.suits(make_weights(), RouterChoice(many))
    assert not few_tokens.suits(make_weights(bias=True), RouterChoice(few))
    assert not few_tokens.suits(make_weights("transposed", dtype=torch.float32), RouterChoice(few))
    assert not few_tokens.suits(make_weights("ragged"), RouterChoice(few))
    assert not few_tokens.suits(make_weights(), RouterChoice(few.flatten(), token_offsets=torch.tensor([0, 4])))
    assert not few_tokens.suits(make_weights(), RouterChoice(few, capacity=1))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, -1]], "an expert id is negative"),
        ([[0, 1, 2, 3, 4, 0]], "a token has more than 5 experts"),
    ],
)
def test_bad_input(ids: list, message: str) -> None:
    experts = torch.tensor(ids)
    with pytest.raises(UsageError, match=message):
        few_tokens.forward(torch.zeros(1, 12, dtype=torch.float64), make_weights(), experts, torch.ones(experts.shape))
