"""Distillation terms against their formulas, and the layers of stock models they are computed on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pico_models import COMMON

from upcycle.errors import UsageError
from upcycle.registry import TARGETS, load
from upcycle.trainers.distillation.losses import (
    LayerOutput,
    capture_outputs,
    layer_outputs,
    logits_kl,
    matching,
    parent_sizes,
    relative_error,
)
from upcycle.trainers.distillation.truncated_logits import TopLogits
from upcycle.trainers.recipe.part_recipes import DistillationParameters
from upcycle.trainers.routing.stock_routers import moe_layers

B, S, V = 2, 3, 7


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in row)
    return [math.exp(z) / total for z in row]


def naive_kl(student: torch.Tensor, parent: torch.Tensor, temperature: float, counting: list[bool]) -> float:
    total = 0.0
    for s, p, counts in zip(student.flatten(0, 1).tolist(), parent.flatten(0, 1).tolist(), counting, strict=True):
        q, w = softmax([z / temperature for z in s]), softmax([z / temperature for z in p])
        total += counts * sum(b * math.log(b / a) for a, b in zip(q, w, strict=True))
    return temperature**2 * total / sum(counting)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    student, parent = (2 * torch.randn(B, S, V, dtype=torch.float64, generator=rng) for _ in range(2))
    return student.requires_grad_(), parent


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_equals_a_naive_loop_and_its_gradient_is_right(
    temperature: float, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    student, parent = pair
    mask = torch.tensor([[True, True, False], [True, False, True]])
    expected = naive_kl(student.detach(), parent, temperature, mask.flatten().tolist())
    actual = logits_kl(student, parent, mask, temperature)
    assert actual.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: logits_kl(x, parent, mask, temperature), (student,))
    assert logits_kl(parent, parent).item() == pytest.approx(0, abs=1e-15)
    assert logits_kl(student, parent, torch.zeros(B, S, dtype=torch.bool)).item() == 0


def test_a_padded_student_is_cut_to_the_parents_vocabulary(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, parent = pair
    padded = torch.cat([student, torch.full((B, S, 2), 5.0, dtype=torch.float64)], dim=-1)
    assert torch.equal(logits_kl(padded, parent), logits_kl(student, parent))
    with pytest.raises(UsageError, match="predicts 7 tokens and the student 6"):
        logits_kl(student[..., :6], parent)


def test_a_cache_is_used_at_temperature_one(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    student, parent = pair
    cached = TopLogits.of(parent, 0.9)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    expected = (cached.kl(student) * mask).sum() / 4
    torch.testing.assert_close(logits_kl(student, cached, mask), expected)
    with pytest.raises(UsageError, match=r"temperature: 2\.0, but cached logits"):
        logits_kl(student, cached, temperature=2.0)


def test_relative_error() -> None:
    s, p = (torch.randn(B, S, 4, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    error = size = 0.0
    for b in range(B):
        for t in range(S):
            if mask[b, t]:
                error += sum((x - y) ** 2 for x, y in zip(s[b, t].tolist(), p[b, t].tolist(), strict=True))
                size += sum(y * y for y in p[b, t].tolist())
    assert relative_error(s, p, mask).item() == pytest.approx(error / size, rel=1e-13)
    assert torch.autograd.gradcheck(lambda x: relative_error(x, p, mask), (s.requires_grad_(),))


def test_a_massive_position_counts_as_32_ordinary_ones() -> None:
    """The first token's squares are often nearly all there is: a sum of all squared errors would tell of it alone."""
    torch.manual_seed(0)
    s, p = (torch.randn(2, 9, 4, dtype=torch.float64) for _ in range(2))
    s[:, 0] *= 300
    p[:, 0] *= 200
    error = size = 0.0
    for b in range(2):
        squares = [sum(y * y for y in p[b, t].tolist()) for t in range(9)]
        for t in range(9):
            weight = min(1.0, 32 * sorted(squares)[4] / squares[t])
            error += weight * sum((x - y) ** 2 for x, y in zip(s[b, t].tolist(), p[b, t].tolist(), strict=True))
            size += weight * squares[t]
    assert relative_error(s, p).item() == pytest.approx(error / size, rel=1e-13)
    assert relative_error(s, p).item() != pytest.approx(((s - p).square().sum() / p.square().sum()).item(), rel=1e-2)

    def layers(states: torch.Tensor) -> list[LayerOutput]:
        return [LayerOutput(0, states, states)]

    whole = parent_sizes(DistillationParameters(hidden=1.0), layers(p))
    parts = [
        matching(DistillationParameters(hidden=1.0), layers(s[b : b + 1]), layers(p[b : b + 1]), sizes=whole)
        for b in range(2)
    ]
    assert sum(part["hidden"] for part in parts).item() == pytest.approx(
        error / size, rel=1e-13
    )  # however rows are divided


def test_matching_is_the_mean_over_layers() -> None:
    mine, theirs = ([LayerOutput(i, torch.randn(B, S, 4), torch.randn(B, S, 4)) for i in range(2)] for _ in range(2))
    found = matching(DistillationParameters(hidden=2.0), mine, theirs)
    assert set(found) == {"hidden"}
    expected = sum(2.0 * relative_error(a.hidden, b.hidden) for a, b in zip(mine, theirs, strict=True)) / 2
    torch.testing.assert_close(found["hidden"], expected)
    assert set(matching(DistillationParameters(hidden=1, ffn=1), mine, theirs)) == {"hidden", "ffn"}
    with pytest.raises(UsageError, match="the parent has 1 layers and the student 2"):
        matching(DistillationParameters(), mine, theirs[:1])


@pytest.mark.parametrize("target", TARGETS)
def test_outputs_are_the_stock_models(target: str, stock: Any, ids: torch.Tensor) -> None:
    model = stock(target).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    seen: dict[int, torch.Tensor] = {}
    for layer in moe_layers(model):
        layer.block.register_forward_hook(
            lambda _, __, out, i=layer.index: seen.update({i: (out[0] if isinstance(out, tuple) else out).detach()})
        )
    with capture_outputs(model) as recorder:
        states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
        found = layer_outputs(recorder.take())
        sum(output.ffn.square().mean() + output.hidden.square().mean() for output in found).backward()
        assert recorder.take() == []
    assert [output.layer for output in found] == [0, 1, 2]
    for output, state in zip(found[:-1], states[1:-1], strict=True):  # the last state is behind the final norm
        assert torch.equal(output.hidden, state)
    for index, value in seen.items():
        assert torch.equal(found[index].ffn, value)
    routers = [weight for layer in moe_layers(model) for weight in layer.router.parameters() if weight.requires_grad]
    taught = [weight.grad is not None and bool(weight.grad.any()) for weight in routers]
    assert taught == [load("target", target).weight_of_chosen is None] * len(routers)


def test_both_blocks_of_a_shared_expert_beside_the_routed_add_up(stock: Any, ids: torch.Tensor) -> None:
    model = stock("granitemoeshared", shared_intermediate_size=16)
    seen = []
    for name in ("block_sparse_moe", "shared_mlp"):
        getattr(model.model.layers[0], name).register_forward_hook(lambda _, __, output: seen.append(output))
    with capture_outputs(model) as recorder:
        model(ids)
        found = layer_outputs(recorder.take())
    assert torch.equal(found[0].ffn, seen[0] + seen[1])


def test_outputs_of_a_dense_parent_are_captured(ids: torch.Tensor) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON))
    with capture_outputs(model) as recorder, torch.no_grad():
        model(ids)
        assert [output.ffn.shape for output in layer_outputs(recorder.take())] == [(2, 12, 32)] * 3
    other = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mpt", n_layers=1, d_model=8, n_heads=2, vocab_size=8)
    )
    with pytest.raises(UsageError, match=r"mpt model has no 'model\.layers'"):
        capture_outputs(other)
    del model.model.layers[1].mlp
    with pytest.raises(UsageError, match="cannot match the layers of a llama model"):
        capture_outputs(model)
