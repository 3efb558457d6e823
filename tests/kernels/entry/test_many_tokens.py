"""Many tokens through whole bf16 blocks, in tiles: against stock code in fp64 on the same choices, and what is left to stock code."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from expert_cases import apart, rounding
from stock_block_cases import make_block, make_model, tokens

import upcycle
from upcycle.kernels.cpu import tiled_blocks
from upcycle.kernels.cpu.tiled_pass import tile_pass
from upcycle.kernels.entry import whole_block
from upcycle.kernels.entry.process_state import forget

pytestmark = pytest.mark.skipif(tile_pass() is None, reason="this CPU has no tiles, or there is no compiler")
SHAPES = [(4, 1, 32, 12), (7, 3, 19, 33), (64, 8, 40, 16), (16, 2, 200, 70)]  # experts, top-k, hidden, width


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens each call of the kernel had, whose memory is NaN at first."""
    made: list[int] = []
    kernel = whole_block.tile_blocks_output

    def note(*told: Any) -> Any:
        made.append(told[2].numel() // told[2].shape[-1])
        return kernel(*told)

    def poisoned(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=tensor.dtype)

    monkeypatch.setattr(whole_block, "tile_blocks_output", note)
    monkeypatch.setattr(tiled_blocks, "recycled", poisoned)
    yield made
    forget()


def worst_rows(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """How far each token's row is off, relative to it, sorted."""
    return ((found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)).flatten().sort().values


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("experts", "top_k", "hidden", "width"), SHAPES)
@pytest.mark.parametrize("shared", [0, 28])
@pytest.mark.parametrize("normalized", [True, False])
def test_a_block(
    experts: int, top_k: int, hidden: int, width: int, shared: int, normalized: bool, runs: list[int]
) -> None:
    block = make_block(experts, top_k, hidden, width, shared, normalized).bfloat16()
    mine, exact = upcycle.use_kernels(deepcopy(block)), deepcopy(block).double()
    threads = torch.get_num_threads()
    # Hidden states are rounded between the two products, and the sum of experts once.
    bound = 2 * rounding(torch.bfloat16, hidden + max(width, shared))
    for count in (17, 70, 600):
        x = tokens(1, count, hidden).bfloat16()
        with torch.no_grad():
            logits, scores, ids = block.gate(x[0])
            chosen = (logits, scores.double(), ids)
            exact.gate.forward = lambda _, chosen=chosen: chosen
            found, expected = mine(x), exact(x.double())
            rows = worst_rows(found, expected)
            alike = (
                len(rows) - len(rows) // 100
            )  # logits that differ by their rounding choose others for a token now and then
            assert rows[:alike].max() < 3 * bound
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
    assert found.dtype == torch.bfloat16


def test_a_model_reads_as_before(runs: list[int]) -> None:
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    for name in ("mixtral", "qwen2_moe", "olmoe"):
        model = make_model(name).bfloat16()
        with torch.no_grad():
            exact = deepcopy(model).double()(ids).logits
            expected = model(ids).logits
            found = upcycle.use_kernels(model)(ids).logits
        assert runs
        runs.clear()
        assert apart(found, exact) < 1.5 * apart(expected, exact) + 1e-3, name


def test_what_is_stock_codes(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_block().bfloat16()
    mine, x = upcycle.use_kernels(deepcopy(block)), tokens(1, 40, 20).bfloat16()
    with torch.no_grad():
        expected = block(x)
        assert apart(mine(x), expected) < 0.02
        assert runs == [40]
        seen: list[str] = []
        handle = mine.shared_expert.register_forward_hook(lambda *_: seen.append("shared"))
        mine(x)
        assert seen
        handle.remove()
        full = upcycle.use_kernels(deepcopy(block).float())
        assert apart(full(x.float()), expected) < 0.02
        exact_gelu = deepcopy(block)
        exact_gelu.experts.act_fn = exact_gelu.shared_expert.act_fn = torch.nn.GELU()
        assert apart(upcycle.use_kernels(deepcopy(exact_gelu))(x), exact_gelu(x)) < 0.02
    mine(x.requires_grad_()).float().sum().backward()
    assert x.grad is not None
    assert runs in ([40], [40, 40]), "for an activation that it lacks, the kernel says so"
    monkeypatch.setattr(tiled_blocks, "LARGEST_TILED", 20 * 2 * 28 - 1)
    forget()
    runs.clear()
    with torch.no_grad():
        assert apart(upcycle.use_kernels(deepcopy(block))(x), expected) < 0.02
    assert not runs


def test_nan_stays_with_its_token(runs: list[int]) -> None:
    block, x = make_block().bfloat16(), tokens(1, 40, 20).bfloat16()
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


def test_equal_scores_are_chosen_as_by_torch(runs: list[int]) -> None:
    """A router of zeros: every expert scores the same."""
    block = make_block(experts=12, top_k=3).bfloat16()
    with torch.no_grad():
        block.gate.weight.zero_()
        x = tokens(1, 40, 20).bfloat16()
        exact = deepcopy(block).double()
        logits, scores, ids = block.gate(x[0])
        exact.gate.forward = lambda _: (logits, scores.double(), ids)
        assert apart(upcycle.use_kernels(block)(x), exact(x.double())) < 0.02
    assert runs == [40]
