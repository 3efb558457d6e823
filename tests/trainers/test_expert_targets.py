"""FactorLLM's and D2DMoE's router losses against loops in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.trainers.expert_targets import ExpertTargetParameters, FfnRecord, capture_ffns, expert_target_losses
from upcycle.trainers.routing import moe_layers

B, S, D, K = 2, 5, 32, 2


@pytest.fixture
def model(stock: Callable[..., Any]) -> Any:
    return stock("mixtral").double()


@pytest.fixture
def parent(model: Any) -> list[FfnRecord]:
    rng = torch.Generator().manual_seed(1)
    shape = (B, S, D)
    return [
        FfnRecord(layer.index, *(torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2)))
        for layer in moe_layers(model)
    ]


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


@torch.no_grad()
def restated(model: Any, parent: list[FfnRecord], mask: torch.Tensor, kind: str) -> float:
    total = 0.0
    for layer, record in zip(moe_layers(model), parent, strict=True):
        experts: Any = layer.experts
        rows = layer.router.weight
        for b in range(B):
            for s in range(S):
                if not mask[b, s]:
                    continue
                x, y = record.inputs[b, s], record.outputs[b, s]
                logits = [float(row @ x) for row in rows]
                outputs = []
                for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
                    m = len(gate_up) // 2
                    gate, up = gate_up[:m] @ x, gate_up[m:] @ x
                    outputs.append(down @ (gate / (1 + torch.exp(-gate)) * up))
                if kind == "prior_approximate":
                    errors = [float(((output - K * y) ** 2).mean()) for output in outputs]
                    best = sorted(range(len(errors)), key=lambda i: errors[i])[:K]
                    q = softmax([1.0 if i in best else 0.0 for i in range(len(errors))])
                    p = softmax(logits)
                    total += sum(p[i] * math.log(p[i] / q[i]) for i in range(len(p)))
                else:
                    norms = [float((output**2).sum().sqrt()) for output in outputs]
                    mean = sum(norms) / len(norms)
                    spread = math.sqrt(sum((norm - mean) ** 2 for norm in norms) / len(norms))
                    offset = sum(logits) / len(logits)
                    total += sum(
                        (logit - offset - (norm - mean) / spread) ** 2
                        for logit, norm in zip(logits, norms, strict=True)
                    ) / len(norms)
    return total / int(mask.sum())


@pytest.mark.parametrize("kind", ["prior_approximate", "output_norms"])
def test_the_formula(model: Any, parent: list[FfnRecord], kind: str) -> None:
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = False
    found = expert_target_losses(ExpertTargetParameters(**{kind: 0.5}), model, parent, mask)
    assert set(found) == {kind}
    assert float(found[kind].detach()) == pytest.approx(0.5 * restated(model, parent, mask, kind), rel=1e-9)


@pytest.mark.parametrize("kind", ["prior_approximate", "output_norms"])
def test_gradient_reaches_routers_alone_and_is_that_of_finite_differences(
    model: Any, parent: list[FfnRecord], kind: str
) -> None:
    mask = torch.ones(B, S, dtype=torch.bool)
    parameters = ExpertTargetParameters(**{kind: 1.0})

    def value() -> torch.Tensor:
        return expert_target_losses(parameters, model, parent, mask)[kind]

    value().backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)}
    weight = moe_layers(model)[0].router.weight
    assert isinstance(weight, torch.Tensor)
    assert weight.grad is not None
    for place in ((0, 3), (2, 7)):
        with torch.no_grad():
            step = 1e-6
            weight[place] += step
            above = float(value())
            weight[place] -= 2 * step
            below = float(value())
            weight[place] += step
        assert float(weight.grad[place]) == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-9)


def test_what_the_parents_ffns_did_is_recorded(pico: Callable[[str], Path], ids: torch.Tensor) -> None:
    from upcycle.stock import load_model

    dense = load_model(pico("llama"))
    with capture_ffns(dense) as recorder, torch.no_grad():
        dense(ids)
        records = recorder.take()
    assert [record.layer for record in records] == [0, 1, 2]
    with torch.no_grad():
        for record, layer in zip(records, dense.model.layers, strict=True):
            assert torch.equal(layer.mlp(record.inputs), record.outputs)


def test_a_moe_parent_is_refused(stock: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="no dense FFNs"):
        capture_ffns(stock("mixtral"))
