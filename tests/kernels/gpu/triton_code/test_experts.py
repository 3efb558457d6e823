"""Forward and backward of whole layers against loops in fp64; all outputs start as NaN, between guard bands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from guards import guarded
from kernel_cases import CASES, QUICK, Case, make
from kernel_oracle import cosine, relative, solve, tolerance

from upcycle.kernels.gpu.backend import backward, forward
from upcycle.kernels.gpu.tile_table import TileTable
from upcycle.kernels.layout.expert_weights import Gradients

# How many stored results lie between inputs and each result (h, values, output; z, dA, s*h, dz, gradient, ...).
ROUNDINGS = {"output": 3, "x": 5, "gate": 4, "up": 4, "down": 3, "scores": 3}
ROUNDINGS |= {f"{name} bias": ROUNDINGS[name] for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_against_the_oracle(name: str, device: torch.device, table: TileTable) -> None:
    case = CASES[name]
    made = make(case, device)
    with guarded() as guards:
        output, z = forward(*made.arguments, True, table)
        found = backward(made.problem.grad, *made.arguments, z, made.gradients(), table=table)
    guards.check()
    exact = solve(made.problem)
    for part, (mine, wanted) in made.pairs(output, found, exact).items():
        assert mine.isfinite().all(), part
        depth = max(case.hidden, *case.widths, case.tokens)
        assert relative(mine, wanted) < tolerance(case.dtype, ROUNDINGS[part], depth), part
        assert cosine(mine, wanted) > 0.9999, part


def test_saving_nothing_gives_the_same_bits(device: torch.device, table: TileTable) -> None:
    made = make(Case(tokens=9, dtype=torch.bfloat16), device)
    output, z = forward(*made.arguments, True, table)
    lean, nothing = forward(*made.arguments, False, table)
    assert z.numel() == made.dispatch.slots * 2 * 32  # with x, all that is kept
    assert nothing.numel() == 0
    assert torch.equal(lean, output)
    kept = backward(made.problem.grad, *made.arguments, z, made.gradients(), table=table)
    again = backward(made.problem.grad, *made.arguments, nothing, made.gradients(), table=table)
    for mine, wanted in zip(again, kept, strict=True):
        assert (mine is None and wanted is None) or torch.equal(mine, wanted)


def test_two_runs_give_the_same_bits(device: torch.device, table: TileTable) -> None:
    made = make(CASES["ragged, varying, primes"], device)

    def run() -> list[torch.Tensor | None]:
        output, z = forward(*made.arguments, True, table)
        return [output, z, *backward(made.problem.grad, *made.arguments, z, made.gradients(), table=table)]

    width = 2 * max(made.weights.all_widths)
    for first, second in zip(run(), run(), strict=True):
        if first is None or second is None:
            assert first is second
        elif first.ndim == 1 and first.numel() == made.dispatch.slots * width:  # z: past a width nothing is written
            continue
        else:
            assert torch.equal(first, second)


def test_what_nobody_routes_to_is_not_read(device: torch.device, table: TileTable) -> None:
    """NaN in dropped slots' weights, in tokens without experts and in idle experts, and 0 * NaN is NaN."""
    case = Case(tokens=9, widths=(32,) * 4, choose=lambda *_: [[4, 4], *[[0, 4], [2, 0]] * 4])
    made = make(case, device)
    x, weights, dispatch, scores = made.arguments
    clean = make(case, device)
    x[0] = torch.nan
    made.problem.grad[0] = torch.nan
    scores[(dispatch.slot_row < 0).nonzero()] = torch.nan
    for expert in (1, 3):
        weights.up_of(expert)[:] = torch.nan
        weights.down_of(expert)[:] = torch.nan
    results = []
    for each in (made, clean):
        output, z = forward(*each.arguments, True, table)
        found = backward(each.problem.grad, *each.arguments, z, each.gradients(), table=table)
        results.append([output, found.x, found.up, found.down, found.scores])
    for mine, wanted in zip(*results, strict=True):
        assert torch.equal(mine, wanted)
    assert (results[0][0][0] == 0).all()
    assert (weights.pick(results[0][2], 1) == 0).all()


def test_only_what_is_needed(device: torch.device, table: TileTable) -> None:
    made = make(Case(tokens=3), device)
    x, _, _, scores = made.arguments
    _, z = forward(*made.arguments, True, table)
    found = backward(made.problem.grad, *made.arguments, z, Gradients(scores=scores), table=table)
    assert found.scores is not None
    assert found.x is found.up is found.down is None
    found = backward(made.problem.grad, *made.arguments, z, Gradients(x=x), table=table)
    assert found.x is not None
    assert found.scores is None


def test_gradients_are_added_to_buffers(device: torch.device, table: TileTable) -> None:
    made = make(Case(tokens=9, dtype=torch.bfloat16, choose=lambda *_: [[0, 1]] * 9), device)
    _, z = forward(*made.arguments, True, table)
    weights = made.weights
    arguments = (made.problem.grad, *made.arguments, z, Gradients(up=weights.up, down=weights.down))
    fresh = backward(*arguments, table=table)
    buffers = Gradients(up=torch.ones_like(weights.up, dtype=torch.float32), down=torch.ones_like(weights.down))
    added = backward(*arguments, into=buffers, table=table)
    assert added.up is buffers.up
    assert added.down is buffers.down
    u = torch.finfo(torch.bfloat16).eps / 2
    assert buffers.up is not None
    assert torch.allclose(buffers.up, 1 + fresh.up.float(), rtol=0, atol=u * float(fresh.up.abs().max()))
    assert torch.allclose(buffers.down.float(), 1 + fresh.down.float(), rtol=2 * u, atol=u)
    assert (weights.pick(buffers.up, 3) == 1).all()


def test_inputs_that_are_not_contiguous(device: torch.device, table: TileTable) -> None:
    case = Case(tokens=9, layout="stacked")
    made = make(case, device)
    x, weights, dispatch, scores = made.arguments

    def run(x: torch.Tensor, weights: object, scores: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        output, z = forward(x, weights, dispatch, scores, True, table)  # type: ignore[arg-type]
        found = backward(grad, x, weights, dispatch, scores, z, made.gradients(), table=table)  # type: ignore[arg-type]
        return [output, *(part for part in found if part is not None)]

    wide = torch.full((9, 2 * case.hidden), torch.nan, device=device)
    wide[:, : case.hidden] = x
    apart = torch.stack([scores, scores * torch.nan], 1)[:, 0]
    turned = replace(weights, up=weights.up.mT.contiguous().mT, down=weights.down.mT.contiguous().mT)
    assert not turned.up.is_contiguous()
    grad = made.problem.grad.T.contiguous().T
    expected = run(x, weights, scores, made.problem.grad)
    for mine, wanted in zip(run(wide[:, : case.hidden], turned, apart, grad), expected, strict=True):
        assert torch.equal(mine, wanted)


def test_no_tokens(device: torch.device, table: TileTable) -> None:
    made = make(Case(tokens=2), device)
    from upcycle.kernels.layout.dispatch import route

    dispatch = route(torch.empty(0, 2, dtype=torch.int64, device=device), 4)
    x, scores = made.problem.x[:0], torch.empty(0, device=device)
    output, z = forward(x, made.weights, dispatch, scores, True, table)
    assert output.shape == (0, 32)
    found = backward(output, x, made.weights, dispatch, scores, z, made.gradients(), table=table)
    assert found.up is not None
    assert (found.up == 0).all()
    assert found.x is not None
    assert found.x.shape == (0, 32)


def test_sums_of_more_rows_than_a_tile_has(device: torch.device, table: TileTable) -> None:
    """A table may say so: what is computed in place must not reach into an expert's next tile."""
    made = make(Case(tokens=40, k=1, choose=lambda *_: [[1]] * 40, dtype=torch.bfloat16), device)
    wide = TileTable(
        {key: replace(tile, m=256, n=32) if key[2] == "combine" else tile for key, tile in table.entries.items()}
    )
    results = []
    for tiles in (table, wide):
        _, z = forward(*made.arguments, True, tiles)
        found = backward(made.problem.grad, *made.arguments, z, made.gradients(), table=tiles)
        results.append([found.x, found.up, found.down])
    for mine, wanted in zip(*results, strict=True):
        assert torch.equal(mine, wanted)
