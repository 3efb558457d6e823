"""The CPU path against the reference in fp64: outputs, every gradient, every layout; and what must never be read."""

from __future__ import annotations

import itertools

import pytest
import torch
from expert_cases import WIDTHS, apart, make_weights, random_ids, rounding, tensors_of, with_grad

from upcycle.kernels.cpu import backend, recycled_memory
from upcycle.kernels.cpu.expert_groups import GROUP_ELEMENTS, GROUP_ROWS, grouped
from upcycle.kernels.layout import reference
from upcycle.kernels.layout.dispatch import route
from upcycle.kernels.layout.expert_weights import ACTIVATIONS, ExpertWeights, Gradients

TOKENS = 17


def case(kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids among five experts and, where numbers per token differ, the tokens' offsets."""
    ids = random_ids(TOKENS, 3, 5)
    if kind == "idle":
        ids[ids == 3] = 5  # expert 3 is idle, and some slots are dropped
    elif kind == "one":
        ids = torch.full((TOKENS, 1), 2)
    elif kind == "all":
        ids = torch.arange(5).expand(TOKENS, 5)
    elif kind == "single":
        ids = ids[:1]
    elif kind == "dynamic":
        numbers = torch.arange(TOKENS) % 4
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), numbers.cumsum(0)])
        return ids.flatten()[: int(bounds[-1])], bounds
    return ids, None


def check_against_reference(
    weights: ExpertWeights,
    ids: torch.Tensor,
    offsets: torch.Tensor | None,
    weighted: bool,
    tolerance: float,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Everything against the reference in fp64 with the same numbers."""
    draw = torch.Generator().manual_seed(3)
    tokens = len(ids) if offsets is None else len(offsets) - 1
    x = torch.randn(tokens, weights.hidden, generator=draw).to(dtype)
    grad = torch.randn(tokens, weights.hidden, generator=draw).to(dtype)
    total = torch.float64 if dtype == torch.float64 else torch.float32
    scores = torch.rand(ids.numel(), generator=draw).to(total) if weighted else None
    exact = with_grad(in_double(weights))
    leaves = [x.detach().clone().double().requires_grad_(), *tensors_of(exact)]
    exact_scores = None
    if scores is not None:
        leaves.append(scores.clone().double().requires_grad_())
        exact_scores = leaves[-1].view(ids.shape)
    expected = reference.experts_output(leaves[0], exact, ids, exact_scores, offsets)
    slopes = torch.autograd.grad(expected, leaves, grad.double(), materialize_grads=True)
    dispatch = route(ids, weights.num_experts, offsets)
    found, z = backend.forward(x, weights, dispatch, scores, True)
    assert found.dtype == x.dtype
    assert apart(found, expected.detach()) < tolerance
    without, nothing = backend.forward(x, weights, dispatch, scores, False)
    assert torch.equal(found, without)
    assert nothing.numel() == 0
    needs = Gradients(x, weights.up, weights.down, weights.up_bias, weights.down_bias, scores)
    made = backend.backward(grad, x, weights, dispatch, scores, z, needs)
    again = backend.backward(grad, x, weights, dispatch, scores, z, needs)
    lean = backend.backward(grad, x, weights, dispatch, scores, z.new_empty(0), needs)
    for name, need, mine, other, anew in zip(Gradients._fields, needs, made, again, lean, strict=True):
        if need is None:
            assert mine is None
            continue
        assert anew is not None
        slope = slopes[[n for n, value in zip(Gradients._fields, needs, strict=True) if value is not None].index(name)]
        assert mine.dtype == need.dtype
        assert apart(mine, slope) < tolerance, name
        assert torch.equal(mine, other), f"{name}: the same bits every time"
        if dtype == total:
            assert torch.equal(mine, anew), f"{name}: the same without z"
        assert apart(anew, slope) < tolerance, f"{name} without z"
        if slope.norm() > 0:
            cosine = torch.nn.functional.cosine_similarity(mine.double().flatten(), slope.flatten(), dim=0)
            assert cosine > 0.9999, name


def in_double(weights: ExpertWeights) -> ExpertWeights:
    from dataclasses import replace

    names = ("up", "down", "up_bias", "down_bias")
    parts = {name: getattr(weights, name) for name in names}
    return replace(weights, **{name: t if t is None else t.detach().double() for name, t in parts.items()})


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["plain", "idle", "one", "all", "single", "dynamic"])
@pytest.mark.parametrize("layout", ["stacked", "transposed", "packed", "ragged"])
def test_every_layout_and_routing(layout: str, kind: str) -> None:
    for gated, bias, weighted in itertools.product([True, False], repeat=3):
        check_against_reference(make_weights(layout, gated, bias), *case(kind), weighted, 1e-13)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    for gated in (True, False):
        check_against_reference(make_weights("ragged", gated, True, activation), *case("idle"), True, 1e-13)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["stacked", "transposed", "packed"])
@pytest.mark.parametrize("native", [True, False])
def test_every_dtype(dtype: torch.dtype, layout: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit weights by way of fp32, and as on a CPU that has instructions for them, where factors are rounded twice more."""
    monkeypatch.setattr("upcycle.kernels.cpu.products.fast_natively", lambda _: native)
    monkeypatch.setattr(backend, "tiled_pass", lambda *_: None)
    hidden, width = 48, 40
    weights = make_weights(layout, bias=True, dtype=dtype, hidden=hidden, width=width)
    tolerance = rounding(dtype, hidden + width) * (3 if native and dtype != torch.float32 else 1)
    for kind in ("idle", "single", "dynamic"):
        check_against_reference(weights, *case(kind), True, tolerance, dtype)


@pytest.mark.parametrize("layout", ["stacked", "transposed", "packed"])
def test_few_rows_of_large_weights(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two to four rows of an expert are multiplied as columns where its matrix is large."""
    monkeypatch.setattr("upcycle.kernels.cpu.products.LARGE", 1)
    seen: list[torch.Size] = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **rest: (seen.append(b.shape), real(a, b, **rest))[1])
    weights = make_weights(layout, dtype=torch.float64, width=40)
    ids = torch.tensor([[0, 1], [0, 1], [2, 0], [2, 3]])
    check_against_reference(weights, ids, None, True, 1e-13)
    assert any(shape[1] in (2, 3) for shape in seen), "columns"


def test_pieces_of_large_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are cast in several pieces, of which the last is smaller."""
    monkeypatch.setattr("upcycle.kernels.cpu.products.PIECE", 48 * 7)
    for layout in ("stacked", "transposed", "packed"):
        weights = make_weights(layout, dtype=torch.bfloat16, hidden=48, width=40)
        check_against_reference(weights, *case("plain"), True, rounding(torch.bfloat16, 88), torch.bfloat16)


def test_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are taken together up to so many rows and as long as they are equally wide; results are the same."""
    weights = make_weights("ragged")
    groups, idle, size = grouped([0, 3, 3, 5, 9, 12], weights)
    assert idle == [1]
    assert [(g.rows.start, g.rows.stop, g.width, list(g.experts)) for g in groups] == [
        (0, 3, 8, [0]),
        (3, 5, 16, [2]),
        (5, 12, 8, [3, 4]),
    ]
    assert [(g.z.start, g.z.stop) for g in groups] == [(0, 48), (48, 112), (112, 224)]
    assert size == 224 == 2 * (3 * WIDTHS[0] + 2 * WIDTHS[2] + 7 * WIDTHS[3])
    narrow, wide = make_weights(), make_weights(width=GROUP_ELEMENTS // GROUP_ROWS)
    for these, most in ((narrow, GROUP_ELEMENTS // (2 * narrow.width(0))), (wide, GROUP_ROWS)):
        many, _, _ = grouped([0, most - 1, most + 1, most + 2, 5 * most, 5 * most], these)
        assert [len(group.experts) for group in many] == [1, 2, 1]
    x, dispatch = torch.randn(TOKENS, 12, dtype=torch.float64), route(case("plain")[0], 5)
    together = backend.forward(x, make_weights(), dispatch, None, True)
    monkeypatch.setattr("upcycle.kernels.cpu.expert_groups.GROUP_ROWS", 1)
    monkeypatch.setattr("upcycle.kernels.cpu.expert_groups.GROUP_ELEMENTS", 0)
    apart_ = backend.forward(x, make_weights(), dispatch, None, True)
    assert torch.equal(together[0], apart_[0])
    assert torch.equal(together[1], apart_[1])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", ["stacked", "ragged"])
def test_what_is_dropped_or_idle_is_not_read(layout: str) -> None:
    weights = make_weights(layout, bias=True)
    ids, _ = case("idle")
    ids[4] = 5  # a token without an expert
    x = torch.randn(TOKENS, 12, dtype=torch.float64)
    x[4] = torch.nan
    scores = torch.rand(ids.numel(), dtype=torch.float64)
    scores[ids.flatten() == 5] = torch.nan
    for tensor in (weights.up_of(3), weights.down_of(3), weights.up_bias_of(3), weights.down_bias[3]):
        tensor.fill_(torch.nan)
    dispatch = route(ids, 5)
    out, z = backend.forward(x, weights, dispatch, scores, True)
    assert out.isfinite().all()
    assert not out[4].any()
    assert len(z) == int(dispatch.offsets.diff() @ torch.tensor(weights.all_widths)) * 2, "room for what is computed"
    grad = torch.randn_like(x)
    grad[4] = torch.nan
    needs = Gradients(x, weights.up, weights.down, weights.up_bias, weights.down_bias, scores)
    made = backend.backward(grad, x, weights, dispatch, scores, z, needs)
    for name, tensor in made._asdict().items():
        assert tensor.isfinite().all(), name
    assert not made.x[4].any()
    assert not made.scores[ids.flatten() == 5].any()
    for tensor in (weights.pick(made.up, 3), weights.down_of(3, made.down), weights.up_bias_of(3, made.up_bias)):
        assert not tensor.any(), "zeros for an idle expert"


def test_only_what_is_asked_for() -> None:
    weights, (ids, _) = make_weights("packed", bias=True), case("plain")
    x, grad = torch.randn(2, TOKENS, 12, dtype=torch.float64)
    scores, dispatch = torch.rand(ids.numel(), dtype=torch.float64), route(ids, 5)
    _, z = backend.forward(x, weights, dispatch, scores, True)
    everything = Gradients(x, weights.up, weights.down, weights.up_bias, weights.down_bias, scores)
    full = backend.backward(grad, x, weights, dispatch, scores, z, everything)
    for name, value in everything._asdict().items():
        one = backend.backward(grad, x, weights, dispatch, scores, z, Gradients(**{name: value}))
        assert torch.equal(getattr(one, name), getattr(full, name))
        assert sum(tensor is not None for tensor in one) == 1


def test_memory_of_ended_tensors_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    recycler = recycled_memory.Recycler()
    monkeypatch.setattr(recycled_memory, "RECYCLER", recycler)
    monkeypatch.setattr(recycled_memory, "LEAST", 1)
    weights, (ids, _) = make_weights("stacked"), case("plain")
    dispatch, x = route(ids, 5), torch.randn(TOKENS, 12, dtype=torch.float64)
    with torch.inference_mode():  # whose tensors could not be written to in training
        first, _ = backend.forward(x, weights, dispatch, None, False)
    assert recycler.waiting, "the buffers"
    for piece in recycler._waiting:
        torch.frombuffer(piece, dtype=torch.float64).fill_(torch.nan)
    needs = Gradients(x, weights.up, weights.down)
    out, z = backend.forward(x, weights, dispatch, None, True)
    made = backend.backward(torch.ones_like(out), x, weights, dispatch, None, z, needs)
    assert torch.equal(out, first)
    before = [tensor.clone() for tensor in (out, z, made.x, made.up, made.down)]
    backend.backward(
        out, x + 1, weights, dispatch, None, backend.forward(x + 1, weights, dispatch, None, True)[1], needs
    )
    assert all(map(torch.equal, (out, z, made.x, made.up, made.down), before)), "what is returned is the caller's"
    steady = recycler.waiting
    for _ in range(3):
        backend.backward(out, x, weights, dispatch, None, z, needs)
    assert recycler.waiting == steady


def test_no_tokens() -> None:
    weights, dispatch = make_weights(), route(torch.zeros(0, 2, dtype=torch.long), 5)
    x = torch.zeros(0, 12, dtype=torch.float64)
    out, z = backend.forward(x, weights, dispatch, None, True)
    assert out.shape == (0, 12)
    made = backend.backward(out, x, weights, dispatch, None, z, Gradients(x, weights.up, weights.down))
    assert made.x.shape == (0, 12)
    assert not made.up.any()
    assert not made.down.any()
