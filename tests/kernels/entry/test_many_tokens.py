"""Many tokens through whole blocks: against stock code in fp64 on the same choices, and what is left to stock code."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from expert_cases import apart, rounding
from stock_block_cases import make_block, make_model, tokens

import upcycle
from upcycle.kernels.cpu import many_tokens
from upcycle.kernels.cpu.tiled_pass import tile_pass
from upcycle.kernels.entry import whole_block
from upcycle.kernels.entry.process_state import forget

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
in_tiles = pytest.mark.skipif(tile_pass() is None, reason="this CPU has no tiles")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=in_tiles)]
SHAPES = [(4, 1, 32, 12), (7, 3, 19, 33), (64, 8, 40, 16), (16, 2, 200, 70)]  # experts, top-k, hidden, width


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens each call of the kernel had, whose memory is NaN at first."""
    made: list[int] = []
    kernel = whole_block.many_tokens_output

    def note(*told: Any) -> Any:
        out = kernel(*told)
        if out is not None:
            made.append(told[1].numel() // told[1].shape[-1])
        return out

    def poisoned(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=tensor.dtype)

    monkeypatch.setattr(whole_block, "many_tokens_output", note)
    monkeypatch.setattr(many_tokens, "recycled", poisoned)
    monkeypatch.setattr(many_tokens, "ROWS_WIDE", (0, 10**9))
    forget()
    yield made
    forget()


def worst_rows(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far each token's row is off, relative to it, sorted."""
    return ((found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)).flatten().sort().values


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "top_k", "hidden", "width"), SHAPES)
@pytest.mark.parametrize("shared", [0, 28])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_block(
    experts: int,
    top_k: int,
    hidden: int,
    width: int,
    shared: int,
    normalized: bool,
    dtype: torch.dtype,
    runs: list[int],
) -> None:
    block = make_block(experts, top_k, hidden, width, shared, normalized).to(dtype)
    mine, exact = upcycle.use_kernels(deepcopy(block)), deepcopy(block).double()
    threads = torch.get_num_threads()
    # Hidden states are rounded between the two products, and the sum of experts once.
    bound = 2 * rounding(dtype, hidden + max(width, shared))
    for count in (17, 70, 600):
        x = tokens(1, count, hidden).to(dtype)
        with torch.no_grad():
            logits, scores, ids = block.gate(x[0])
            chosen = (logits, scores.double(), ids)
            exact.gate.forward = lambda _, chosen=chosen: chosen
            found, expected = mine(x), exact(x.double())
            rows = worst_rows(found, expected)
            # Logits that differ by their rounding choose others for a token now and then.
            assert rows[: len(rows) - len(rows) // 100].max() < 3 * bound
            if dtype == torch.bfloat16:
                assert rows.median() < 1.1 * worst_rows(block(x), expected).median(), "stock code rounds more often"
            for number in (1, 2, 5):
                torch.set_num_threads(number)
                try:
                    assert torch.equal(mine(x), found), number
                finally:
                    torch.set_num_threads(threads)
            if count > 60:
                assert torch.equal(mine(x[:, 3:60]), found[:, 3:60]), "a token does not depend on those beside it"
    assert runs == [17] * 4 + [70] * 4 + [57] + [600] * 4 + [57]
    assert found.shape == x.shape
    assert found.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_reads_as_before(dtype: torch.dtype, runs: list[int]) -> None:
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    for name in ("mixtral", "qwen2_moe", "olmoe"):
        model = make_model(name).to(dtype)
        with torch.no_grad():
            exact = deepcopy(model).double()(ids).logits
            expected = model(ids).logits
            found = upcycle.use_kernels(model)(ids).logits
        assert runs
        runs.clear()
        assert apart(found, exact) < 1.5 * apart(expected, exact) + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu", "relu2"])
def test_activations(dtype: torch.dtype, activation: str, runs: list[int]) -> None:
    from transformers.activations import ACT2FN

    block, x = make_block().to(dtype), tokens(1, 40, 20).to(dtype)
    block.experts.act_fn, block.shared_expert.act_fn = ACT2FN[activation], ACT2FN[activation]
    with torch.no_grad():
        expected = block(x)
        found = upcycle.use_kernels(block)(x)
    assert runs == [40]
    assert apart(found, expected) < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stock_codes(dtype: torch.dtype, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    block, bound = make_block().to(dtype), 1e-5 if dtype == torch.float32 else 0.02
    mine, x = upcycle.use_kernels(deepcopy(block)), tokens(1, 40, 20).to(dtype)
    with torch.no_grad():
        expected = block(x)
        assert apart(mine(x), expected) < bound
        assert runs == [40]
        seen: list[str] = []
        handle = mine.shared_expert.register_forward_hook(lambda *_: seen.append("shared"))
        mine(x)
        assert seen
        handle.remove()
        exact_gelu = deepcopy(block)
        exact_gelu.experts.act_fn = exact_gelu.shared_expert.act_fn = torch.nn.GELU()
        assert apart(upcycle.use_kernels(deepcopy(exact_gelu))(x), exact_gelu(x)) < bound
    mine(x.requires_grad_()).float().sum().backward()
    assert x.grad is not None
    x = x.detach()
    for name in ("LARGEST_TILED", "LARGEST_WIDE"):
        monkeypatch.setattr(many_tokens, name, 20 * 2 * 28 - 1)
    with torch.no_grad():
        assert apart(upcycle.use_kernels(deepcopy(block))(x), expected) < bound
    assert runs == [40]


def test_fp32_where_an_expert_has_neither_few_rows_nor_many(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_tokens, "ROWS_WIDE", (6, 10))
    block = make_block(experts=4, top_k=2)
    mine = upcycle.use_kernels(deepcopy(block))
    for count in (11, 17, 19, 20, 21):  # eleven are few tokens, which have a kernel of their own
        x = tokens(1, count, 20)
        with torch.no_grad():
            assert apart(mine(x), block(x)) < 1e-5
    assert runs == [17, 19, 20]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_with_its_token(dtype: torch.dtype, runs: list[int]) -> None:
    block, x = make_block().to(dtype), tokens(1, 40, 20).to(dtype)
    clean = x.clone()
    x[0, 7, 3], x[0, 30] = torch.nan, torch.inf
    mine = upcycle.use_kernels(block)
    with torch.no_grad():
        found, expected = mine(x)[0], mine(clean)[0]
    assert runs == [40, 40]
    rest = [token for token in range(40) if token not in (7, 30)]
    assert found[7].isnan().all()
    assert found[30].isnan().all()
    assert torch.equal(found[rest], expected[rest])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_are_chosen_as_by_torch(dtype: torch.dtype, runs: list[int]) -> None:
    """A router of zeros: every expert scores the same."""
    block = make_block(experts=12, top_k=3).to(dtype)
    with torch.no_grad():
        block.gate.weight.zero_()
        x = tokens(1, 40, 20).to(dtype)
        exact = deepcopy(block).double()
        logits, scores, ids = block.gate(x[0])
        exact.gate.forward = lambda _: (logits, scores.double(), ids)
        assert apart(upcycle.use_kernels(block)(x), exact(x.double())) < 0.02
    assert runs == [40]
