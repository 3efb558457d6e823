"""The compiled kernel for whole blocks: against the specification in fp64, torch's ties, its bits, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from expert_cases import apart, rounding

from upcycle.kernels.cpu.native import few_blocks
from upcycle.kernels.cpu.native.few_blocks import BlockRule, BlockWeights, block_structure, few_blocks_output
from upcycle.kernels.layout import reference
from upcycle.kernels.layout.expert_weights import ACTIVATIONS, ExpertWeights

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
KINDS = ("alone", "shared", "switched")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_block(
    experts: int = 6, hidden: int = 20, width: int = 12, shared: int = 28, kind: str = "switched", dtype: Any = None
) -> BlockWeights:
    """Random weights; a router whose choices are not close calls."""
    draw = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw) / shape[-1] ** 0.5).to(dtype or torch.float32)

    routed = (3 * random(experts, hidden), random(experts, 2 * width, hidden), random(experts, hidden, width))
    if kind == "alone":
        return BlockWeights(*routed)
    always = (random(shared, hidden), random(shared, hidden), random(hidden, shared))
    return BlockWeights(*routed, *always, random(1, hidden) if kind == "switched" else None)


def expected(x: torch.Tensor, weights: BlockWeights, rule: BlockRule) -> torch.Tensor:
    """The router's choice as stock code makes it, the rest in fp64."""
    logits = torch.nn.functional.linear(x, weights.router)
    scores, ids = logits.softmax(-1, dtype=torch.float32).topk(rule.top_k)
    if rule.normalized:
        scores = scores / scores.sum(-1, keepdim=True)
    scores = (scores.to(x.dtype) if rule.rounded else scores).double()
    routed = ExpertWeights(weights.up.double(), weights.down.double(), rule.activation)
    made = reference.experts_output(x.double(), routed, ids, scores)
    if weights.shared_up is None:
        return made
    both = torch.cat([weights.shared_gate, weights.shared_up]).double()
    always = ExpertWeights(both[None], weights.shared_down.double()[None], rule.activation)
    added = reference.experts_output(x.double(), always, torch.zeros(len(x), 1, dtype=torch.long))
    if weights.shared_switch is not None:
        added = added * (x.double() @ weights.shared_switch.double().T).sigmoid()
    return made + added


def run(x: torch.Tensor, weights: BlockWeights, rule: BlockRule) -> torch.Tensor:
    structure, kernel = block_structure(weights, rule), few_blocks.few_blocks()
    assert structure is not None
    assert kernel is not None
    found = few_blocks_output(kernel, structure, x)
    assert found is not None
    return found


@needs_compiler
@pytest.mark.usefixtures("poisoned")
@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "width", "shared"),
    [(1, 1, 1, 8, 8, 8), (1, 8, 64, 37, 29, 50), (5, 3, 3, 64, 17, 1), (8, 1, 64, 131, 5, 9), (2, 2, 4, 3, 1, 2)],
)
def test_the_specification(
    tokens: int, top_k: int, experts: int, hidden: int, width: int, shared: int, kind: str, dtype: torch.dtype
) -> None:
    weights = make_block(experts, hidden, width, shared, kind, dtype)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    for normalized in (True, False):
        rule = BlockRule(top_k, normalized, normalized, "silu")
        bound = rounding(dtype, hidden + width + shared)
        assert apart(run(x, weights, rule), expected(x, weights, rule)) < bound


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    weights, x = make_block(), 2 * torch.randn(3, 20)
    rule = BlockRule(2, True, True, activation)
    assert apart(run(x, weights, rule), expected(x, weights, rule)) < rounding(torch.float32, 60)


@needs_compiler
@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (7, 1), (64, 1), (64, 8), (200, 3), (200, 40), (5, 5)])
@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_ties_fall_as_torch_lets_them(experts: int, top_k: int, distinct: int) -> None:
    """Which of several experts with the same logit are taken is torch.topk's own affair. A zero router ties them all.

    The numbers are whole and small, so that torch's product gives the same rows of a router the same logits, too.
    """
    draw = torch.Generator().manual_seed(experts + top_k)
    weights = make_block(experts, kind="alone")
    few = torch.randint(-2, 3, (distinct, 20), generator=draw).float() * (distinct > 1)
    weights = weights._replace(router=few[torch.randint(distinct, (experts,), generator=draw)].contiguous())
    x, rule = torch.randint(-2, 3, (8, 20), generator=draw).float(), BlockRule(top_k, True, True, "silu")
    assert apart(run(x, weights, rule), expected(x, weights, rule)) < rounding(torch.float32, 40)


@needs_compiler
@pytest.mark.usefixtures("threads", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_beside_others_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    weights, rule = make_block(5, 331, 203, 401, dtype=dtype), BlockRule(3, True, True, "silu")
    x = torch.randn(13, 331).to(dtype)
    torch.set_num_threads(1)
    alone = torch.cat([run(x[t : t + 1], weights, rule) for t in range(13)])
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(run(x, weights, rule), alone)


@needs_compiler
def test_a_nan_stays_with_its_token() -> None:
    weights, rule = make_block(), BlockRule(2, True, True, "silu")
    x = torch.randn(4, 20)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    assert run(x, weights, rule).isnan().all(1).tolist() == [False, True, True, False]


@needs_compiler
def test_strided_and_batched_input() -> None:
    weights, rule = make_block(), BlockRule(2, True, True, "silu")
    x = torch.randn(20, 6).T
    assert torch.equal(run(x, weights, rule), run(x.contiguous(), weights, rule))
    assert torch.equal(run(x.reshape(2, 3, 20), weights, rule).flatten(0, 1), run(x, weights, rule))


def test_an_input_without_memory() -> None:
    weights, x = make_block(), torch.randn(3, 20)
    structure = block_structure(weights, BlockRule(2, True, True, "silu"))
    assert structure is not None
    x.untyped_storage().resize_(0)
    assert few_blocks_output(lambda *_: pytest.fail("it was called"), structure, x) is None


def test_what_it_refuses() -> None:
    rule, whole = BlockRule(2, True, True, "silu"), make_block()
    assert block_structure(whole, rule) is not None
    assert block_structure(whole, rule._replace(top_k=7)) is None
    assert block_structure(whole, rule._replace(top_k=0)) is None
    assert block_structure(whole, rule._replace(activation="mish")) is None
    for dtype in (torch.float64, torch.float16):
        assert block_structure(make_block(dtype=dtype), rule) is None
    for name, tensor in whole._asdict().items():
        others = (
            tensor.bfloat16(),
            tensor.to("meta"),
            tensor[..., :-1].contiguous(),
            torch.randn(*tensor.shape[:-1], 2 * tensor.shape[-1])[..., ::2],
            torch.cat([tensor, tensor]),
        )
        for other in others:
            assert block_structure(whole._replace(**{name: other}), rule) is None, name
    assert block_structure(whole._replace(shared_down=None), rule) is None


def test_memory_that_was_given_back_is_not_read() -> None:
    weights = make_block()
    weights.up.untyped_storage().resize_(0)
    assert block_structure(weights, BlockRule(2, True, True, "silu")) is None
