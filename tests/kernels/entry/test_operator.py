"""The differentiable function and the compiler's operator: gradients, kept bytes, properties, and every bad input."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from expert_cases import apart, make_weights, random_ids, rounding, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from upcycle.errors import UsageError
from upcycle.kernels.entry import compiled_operator
from upcycle.kernels.entry.compiled_operator import Saved, compiled_output
from upcycle.kernels.entry.operator import experts_output
from upcycle.kernels.layout import reference
from upcycle.kernels.layout.dispatch import RouterChoice
from upcycle.kernels.layout.expert_weights import ExpertWeights, WeightTensors, pack

Run = Callable[..., torch.Tensor]


def compiled(
    x: torch.Tensor,
    weights: ExpertWeights,
    experts: torch.Tensor,
    scores: torch.Tensor | None = None,
    token_offsets: torch.Tensor | None = None,
    capacity: int | None = None,
    save: Saved = "z",
) -> torch.Tensor:
    choice = RouterChoice(experts, scores, token_offsets, capacity)
    return compiled_output(x, weights.tensors, weights.layout, choice, save)


@pytest.mark.parametrize("run", [experts_output, compiled])
@pytest.mark.parametrize(
    ("layout", "gated", "bias"), [("stacked", True, False), ("ragged", True, True), ("packed", False, True)]
)
def test_gradcheck(run: Run, layout: str, gated: bool, bias: bool) -> None:
    """With an idle expert, dropped slots and a token without any."""
    weights = make_weights(layout, gated, bias, hidden=4, grad=True)
    ids = random_ids(5, 2, 5)
    ids[ids == 1] = 5
    ids[2] = 5
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name in ("up", "down", "up_bias", "down_bias") if getattr(weights, name) is not None]

    def function(x: torch.Tensor, scores: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        return run(x, replace(weights, **dict(zip(names, parts, strict=True))), ids, scores)

    assert torch.autograd.gradcheck(function, (x, scores, *tensors_of(weights)), fast_mode=True)


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_operator_is_the_function(dynamic: bool) -> None:
    weights = make_weights("ragged", bias=True, grad=True)
    ids, offsets = random_ids(6, 2, 6), None
    if dynamic:
        ids, offsets = ids.flatten(), torch.tensor([0, 0, 5, 6, 12])
    x = torch.randn(4 if dynamic else 6, 12, dtype=torch.float64, requires_grad=True)
    scores = torch.rand(ids.shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, scores, *tensors_of(weights)]
    first, second = (run(x, weights, ids, scores, offsets, 2) for run in (experts_output, compiled))
    assert torch.equal(first, second)
    grad = torch.randn_like(first)
    for one, other in zip(*(torch.autograd.grad(out, inputs, grad) for out in (first, second)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("run", [experts_output, compiled])
def test_nothing_but_x_is_kept(run: Run) -> None:
    """With ``save="none"`` the gradients have the same bits, and z is not kept."""
    weights = make_weights("ragged", bias=True, grad=True)
    ids, scores = random_ids(6, 2, 6), torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, scores, *tensors_of(weights)]
    grad = torch.randn(6, 12, dtype=torch.float64)
    made, sizes = [], []
    for save in ("z", "none"):
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = run(x, weights, ids, scores, save=save)
        sizes.append(sum(kept.values()))
        made.append(torch.autograd.grad(out, inputs, grad))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    widths = torch.tensor([*weights.all_widths, 0])
    z = widths.max() * ids.numel() if run is compiled else widths[ids].sum()
    assert sizes[0] - sizes[1] == 8 * 2 * int(z)


def test_what_is_kept_has_a_name() -> None:
    with pytest.raises(UsageError, match="save is 'everything'") as caught:
        experts_output(
            torch.randn(2, 12), make_weights("stacked", dtype=torch.float32), random_ids(2, 2, 5), save="everything"
        )  # type: ignore[arg-type]
    assert caught.value.hint == "one of: z, none"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout", ["stacked", "ragged"])
@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(layout: str, keep: bool) -> None:
    """With sentinels, so that z has more room than is used."""
    w = make_weights(layout, bias=True, dtype=torch.float32, grad=keep)
    x = torch.randn(6, 12, requires_grad=keep)
    scores = torch.rand(6, 2, requires_grad=keep)
    arguments = (x, *w.tensors, *RouterChoice(random_ids(6, 2, 6), scores), *w.layout, keep)
    torch.library.opcheck(compiled_operator._experts, arguments)
    torch.library.opcheck(compiled_operator._experts, (*arguments[:3], None, None, *arguments[5:]))


def test_compiles_whole() -> None:
    weights = make_weights("stacked", dtype=torch.float32, grad=True)
    x = torch.randn(6, 12, requires_grad=True)
    ids, scores = random_ids(6, 2, 5), torch.rand(6, 2)

    def layer(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        tensors = WeightTensors(up, down)
        return compiled_output(x * 2, tensors, weights.layout, RouterChoice(ids, scores)).tanh()

    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = (x, weights.up, weights.down)
    found, expected = whole(*inputs), experts_output(x * 2, weights, ids, scores).tanh()
    assert torch.equal(found, expected)
    for one, other in zip(*(torch.autograd.grad(out.sum(), inputs) for out in (found, expected)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropped", [True, False])
def test_kept_bytes(dtype: torch.dtype, dropped: bool) -> None:
    """x and z, b (T H + 2 R I), beside weights, scores and index vectors."""
    tokens, top_k, hidden, width = 64, 3, 24, 40
    weights = make_weights("stacked", dtype=dtype, hidden=hidden, width=width, grad=True)
    ids = random_ids(tokens, top_k, 5)
    if dropped:
        ids[ids == 2] = 5
    x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    scores = torch.rand(tokens, top_k, requires_grad=True)
    kept: dict[int, int] = {}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        experts_output(x, weights, ids, scores)
    for tensor in (weights.up, weights.down, scores):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    rows = int((ids < 5).sum())
    assert sum(kept.values()) == dtype.itemsize * (tokens * hidden + 2 * rows * width)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(65, 200), st.integers(1, 5))
def test_permuted_tokens_are_permuted_outputs(seed: int, tokens: int, top_k: int) -> None:
    """Every token's sum is made in its own slots' order, so that in fp32 only the products' rounding may differ."""
    draw = torch.Generator().manual_seed(seed)
    weights = make_weights("stacked", dtype=torch.float32, hidden=16)
    x, ids = torch.randn(tokens, 16, generator=draw), random_ids(tokens, top_k, 5, seed)
    scores, order = torch.rand(tokens, top_k, generator=draw), torch.randperm(tokens, generator=draw)
    plain = experts_output(x, weights, ids, scores)
    assert torch.equal(experts_output(x[order], weights, ids[order], scores[order]), plain[order])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 100))
def test_renumbered_experts_change_nothing(seed: int, tokens: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weights = make_weights("stacked")
    order = torch.randperm(5, generator=draw)
    other = replace(weights, up=weights.up[order], down=weights.down[order])
    names = torch.empty_like(order).scatter_(0, order, torch.arange(5))
    x, ids = torch.randn(tokens, 12, dtype=torch.float64, generator=draw), random_ids(tokens, 2, 5, seed)
    scores = torch.rand(tokens, 2, generator=draw)
    assert torch.equal(experts_output(x, other, names[ids], scores), experts_output(x, weights, ids, scores))


@pytest.mark.parametrize("tokens", [1, 7, 100])
@pytest.mark.parametrize("layout", ["stacked", "packed"])
def test_all_slices_of_a_dense_ffn_are_the_ffn(layout: str, tokens: int) -> None:
    hidden, width, experts = 24, 16, 4
    gate, up = torch.randn(2, experts * width, hidden) / hidden**0.5
    down = torch.randn(hidden, experts * width) / width**0.5
    parts = [torch.cat(pair) for pair in zip(gate.chunk(experts), up.chunk(experts), strict=True)]
    weights = ExpertWeights(torch.stack(parts), torch.stack(down.chunk(experts, 1)).contiguous())
    x = torch.randn(tokens, hidden)
    dense = (torch.nn.functional.silu(x.double() @ gate.T.double()) * (x.double() @ up.T.double())) @ down.T.double()
    found = experts_output(
        x, pack(weights) if layout == "packed" else weights, torch.arange(experts).expand(tokens, -1)
    )
    assert apart(found, dense) < rounding(torch.float32, hidden + experts * width)


def test_twice_an_expert_at_half_the_weight() -> None:
    weights = make_weights("stacked")
    x = torch.randn(80, 12, dtype=torch.float64)
    once = experts_output(x, weights, torch.full((80, 1), 3), torch.ones(80, 1))
    twice = experts_output(x, weights, torch.full((80, 2), 3), torch.full((80, 2), 0.5))
    assert torch.equal(once, twice)


def test_no_weight_hides_an_expert_but_not_from_the_router() -> None:
    weights = make_weights("stacked")
    scores = torch.zeros(80, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(80, 12, dtype=torch.float64, requires_grad=True)
    out = experts_output(x, weights, random_ids(80, 2, 5), scores)
    assert not out.any()
    slope, through = torch.autograd.grad(out.sum(), [scores, x])
    assert slope.abs().min() > 0
    assert not through.any()


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(
        experts_output(x, make_weights(), random_ids(3, 2, 5)).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


IDS = [[0, 1], [2, 3], [4, 0]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 11)}, r"x has the shape \(3, 11\), not \[T, 12\]"),
        ({"x": torch.zeros(1, 3, 12)}, r"x has the shape \(1, 3, 12\)"),
        ({"x": torch.zeros(3, 12, dtype=torch.bfloat16)}, "x is torch.bfloat16 on cpu, the experts are torch.float32"),
        ({"x": torch.zeros(4, 12)}, "x has 4 tokens, the routing 3"),
        ({"scores": torch.ones(3, 1)}, r"scores are torch.float32 of the shape \(3, 1\), not floating of \(3, 2\)"),
        ({"scores": torch.ones(3, 2, dtype=torch.long)}, "scores are torch.int64"),
        ({"scores": torch.ones(3, 2, device="meta")}, "scores are on meta, x is on cpu"),
        ({"experts": torch.tensor([[0, 1], [2, -3], [4, 0]])}, "an expert id is negative"),
        ({"experts": torch.tensor(IDS).float()}, "expert ids are torch.float32"),
        ({"experts": torch.tensor(IDS).flatten()}, r"not \[T, K\]"),
        ({"experts": torch.arange(5).repeat(3, 2)}, "a token has more than 5 experts"),
        ({"experts": torch.tensor(IDS, device="meta")}, "expert ids are on meta"),
    ],
)
@pytest.mark.parametrize("learns", [True, False])
def test_bad_input(changes: dict, message: str, learns: bool) -> None:
    weights = make_weights("stacked", dtype=torch.float32, grad=learns)
    arguments = {"x": torch.zeros(3, 12), "experts": torch.tensor(IDS), "scores": None}
    with pytest.raises(UsageError, match=message):
        experts_output(weights=weights, **{**arguments, **changes})


@pytest.mark.parametrize("tokens", [3, 90])  # few, as when text is generated, and many
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_score_that_is_not_finite_makes_its_token_so_and_no_other(tokens: int, learns: bool, bad: float) -> None:
    weights = make_weights("stacked", dtype=torch.float32, grad=learns)
    x, ids, scores = torch.randn(tokens, 12), random_ids(tokens, 2, 5), torch.rand(tokens, 2)
    scores[1, 0] = bad
    eager = experts_output(x, weights, ids, scores)
    compiled = compiled_output(x, weights.tensors, weights.layout, RouterChoice(ids, scores))
    for out in (eager, compiled, reference.experts_output(x, weights, ids, scores)):
        expected = torch.zeros(tokens, dtype=torch.bool)
        expected[1] = True
        assert torch.equal(~out.isfinite().all(1), expected)
    if learns:
        eager.sum().backward()
        assert weights.up.grad is not None
        assert not weights.up.grad[ids[1, 0]].isfinite().all(), "the trainer sees it in the gradient, too"


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("learns", [True, False])
def test_without_numbers_there_are_shapes(device: str, learns: bool) -> None:
    weights = make_weights("stacked", dtype=torch.float32, grad=learns)
    x, ids, scores = torch.randn(3, 12), torch.tensor(IDS), torch.rand(3, 2)
    if device == "meta":
        made = replace(weights, up=weights.up.to("meta"), down=weights.down.to("meta"))
        out = experts_output(x.to("meta"), made, ids.to("meta"), scores.to("meta"))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # the weights stay real, as in a model that is traced
            x, ids, scores = (mode.from_tensor(tensor) for tensor in (x, ids, scores))
            out = experts_output(x, weights, ids, scores)
    assert (out.shape, out.dtype, out.device.type) == ((3, 12), torch.float32, "meta" if device == "meta" else "cpu")


def test_what_a_graph_keeps_is_autograds_to_let_go() -> None:
    """After the backward pass the weights of a step are nobody's, though its output lives on."""
    weights = make_weights("stacked", dtype=torch.float32, grad=True)
    up = weights.up * 1  # as computed from parameters, where adapters are added to them
    out = experts_output(torch.randn(80, 12), weights.around(up, *weights.tensors[1:]), random_ids(80, 2, 5))
    out.sum().backward()
    kept = weakref.ref(up.untyped_storage())
    del up
    gc.collect()
    assert kept() is None
    assert out.grad_fn is not None


def test_strides_do_not_matter() -> None:
    weights = make_weights("stacked", dtype=torch.float32, hidden=16, grad=True)
    wide = torch.randn(16, 80)
    ids, scores = random_ids(80, 4, 5)[:, ::2], torch.rand(2, 80).T
    out = experts_output(wide.T, weights, ids, scores)
    assert torch.equal(out, experts_output(wide.T.contiguous(), weights, ids.contiguous(), scores.contiguous()))
    (slope,) = torch.autograd.grad(out, [weights.up], torch.randn(16, 80).T)
    assert slope.isfinite().all()
