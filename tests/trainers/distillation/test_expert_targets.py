"""FactorLLM's and D2DMoE's router losses, by loops over the dense FFN's own slices, of which the conversion's scale is no part."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import upcycle
from upcycle.architectures.dense.base import Feature
from upcycle.architectures.stock import load_stock_model
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.errors import UsageError
from upcycle.ffn.blueprint import BlueprintFile
from upcycle.registry import TARGETS, load
from upcycle.trainers.distillation.expert_targets import (
    FfnRecord,
    capture_ffns,
    expert_target_losses,
    left_to_routed,
    recorded_scale,
)
from upcycle.trainers.recipe.part_recipes import ExpertTargetParameters
from upcycle.trainers.routing.stock_routers import moe_layers

B, S, D, UNIT = 2, 5, 32, 0.05
Pico = Callable[[str], Path]
# A family for every target that holds shared experts.
WITH_SHARED = {
    "qwen2_moe": "qwen2", "qwen3_5_moe_text": "qwen3.5", "granitemoeshared": "granite", "glm4_moe": "phi3-partial",
    "dots1": "qwen3", "solar_open": "llama", "cohere2_moe": "cohere2", "ernie4_5_moe": "ernie4.5",
    "granitemoe_swa": "granite-swa", "deepseek_v3": "youtu",
}  # fmt: skip
CASES = {
    "exact": {"scale": "exact", "experts": 4, "top_k": 2},
    "sum": {"scale": "sum", "experts": 8, "top_k": 2},
    "shared": {"scale": "paper", "experts": 8, "top_k": 3, "shared": 4, "target": "qwen2_moe"},
}


class Case:
    """A split of the pico Llama, with the dense slices that its experts are, and random inputs."""

    def __init__(self, dense: Path, out: Path, keys: dict[str, Any]) -> None:
        told = {"method": "factor", "verification": {"enabled": False}, "router": "cool", "layout": "fused", **keys}
        upcycle.convert(str(dense), out, **told)
        self.folder, self.model = out, load_stock_model(out, "float32").double()
        checkpoint, blueprints = DenseCheckpoint.open(str(dense)), BlueprintFile(out / "blueprint.safetensors")
        rng = torch.Generator().manual_seed(1)
        self.top_k, self.experts = keys["top_k"], keys["experts"]
        self.inputs = [torch.randn(B, S, D, generator=rng, dtype=torch.float64) for _ in range(3)]
        self.ffns = [checkpoint.feed_forward(layer, "float32") for layer in range(3)]
        self.blueprints = [blueprints.layer(layer) for layer in range(3)]

    def slice(self, layer: int, neurons: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """What some neurons of the dense FFN (``None``: all) make of one token."""
        ffn, total = self.ffns[layer], torch.zeros(D, dtype=torch.float64)
        for j in range(ffn.intermediate_size) if neurons is None else neurons.tolist():
            gate, up = (float(matrix[j].double() @ x) for matrix in (ffn.gate, ffn.up))
            total += gate / (1 + math.exp(-gate)) * up * ffn.down[:, j].double()
        return total

    def records(self) -> list[FfnRecord]:
        found = []
        for layer, x in enumerate(self.inputs):
            rows = [self.slice(layer, None, token) for token in x.flatten(0, 1)]
            found.append(FfnRecord(layer, x, torch.stack(rows).view(B, S, D)))
        return found

    def losses(self, mask: torch.Tensor, records: list[FfnRecord] | None = None, **weights: float) -> dict[str, float]:
        scale = recorded_scale(self.folder)
        parameters = ExpertTargetParameters(expert_scale=scale, router_tolerance=UNIT, **weights)
        found = expert_target_losses(parameters, self.model, records or self.records(), mask)
        return {name: float(value.detach()) for name, value in found.items()}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, pico: Pico, tmp_path: Path) -> Case:
    return Case(pico("llama"), tmp_path / "out", CASES[request.param])


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def restated(case: Case, mask: torch.Tensor) -> dict[str, float]:
    """The papers' formulas, token by token: a label is a comparison of dense slices with dense outputs."""
    found = dict.fromkeys(("prior_approximate", "prior_balance", "output_norms"), 0.0)
    e, k = case.experts, case.top_k
    for layer, blueprint in enumerate(case.blueprints):
        rows = moe_layers(case.model)[layer].router.weight.detach()
        for b, s in mask.nonzero().tolist():
            x = case.inputs[layer][b, s]
            slices = [case.slice(layer, expert.neurons, x) for expert in blueprint.routed]
            dense = case.slice(layer, None, x) - sum(
                case.slice(layer, expert.neurons, x) for expert in blueprint.shared
            )
            logits = [float(row @ x) / UNIT for row in rows]
            p = softmax(logits)
            errors = [float(((part - k / e * dense) ** 2).mean()) for part in slices]
            best = sorted(range(e), key=lambda i: errors[i])[:k]
            q = softmax([1.0 if i in best else 0.0 for i in range(e)])
            found["prior_approximate"] += sum(p[i] * math.log(p[i] / q[i]) for i in range(e))
            found["prior_balance"] += sum(sorted(p)[-k:]) / e
            norms = [math.sqrt(float(part @ part)) for part in slices]
            mean, offset = sum(norms) / e, sum(logits) / e
            spread = math.sqrt(sum((norm - mean) ** 2 for norm in norms) / e)
            predicted = [mean + spread * (logit - offset) for logit in logits]
            found["output_norms"] += sum((a - n) ** 2 for a, n in zip(predicted, norms, strict=True)) / e / 3
    return {name: value / int(mask.sum()) for name, value in found.items()}


@pytest.mark.one_in(3)
def test_losses_equal_the_papers_formulas(case: Case) -> None:
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = False
    wanted = restated(case, mask)
    weights = {"prior_approximate": 0.5, "prior_balance": 2.0, "output_norms": 3.0}
    # Stored in fp32, and scaled there: a few roundings of 6e-8 each.
    for name, value in case.losses(mask, **weights).items():
        assert value == pytest.approx(weights.pop(name) * wanted[name], rel=1e-5)
    assert not weights


@pytest.mark.one_in(2)
def test_routers_that_tell_the_norms_leave_no_error_and_weigh_the_chosen_alike(case: Case) -> None:
    """What D2DMoE's loss asks for is about equal weights, whatever the norms."""
    records = case.records()
    for layer, record in zip(moe_layers(case.model), records, strict=True):
        x = record.inputs.flatten(0, 1)
        slices = [
            [case.slice(layer.index, e.neurons, t).norm() for e in case.blueprints[layer.index].routed] for t in x
        ]
        norms = torch.tensor(slices, dtype=torch.float64)
        wanted = UNIT * (norms - norms.mean(1, keepdim=True)) / norms.std(1, keepdim=True, correction=0)
        rows = torch.linalg.lstsq(x, wanted).solution.T  # ten tokens, 32 inputs: an exact fit
        layer.router.weight.data.copy_(rows)
        _, weights, experts = layer.router(x)
        assert torch.equal(experts.sort(1).values, norms.topk(case.top_k).indices.sort(1).values)
        # No standardised number of E exceeds sqrt(E - 1), so two differ by 2 sqrt(E - 1) at most.
        assert (weights.max(1).values / weights.min(1).values).max() <= math.exp(UNIT * 2 * math.sqrt(case.experts - 1))
    mask = torch.ones(B, S, dtype=torch.bool)
    assert case.losses(mask, records, output_norms=1.0)["output_norms"] < 1e-9  # of squared norms of order one, in fp32


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["prior_approximate", "prior_balance", "output_norms"])
def test_gradient_reaches_routers_alone_and_is_that_of_finite_differences(
    kind: str, pico: Pico, tmp_path: Path
) -> None:
    case = Case(pico("llama"), tmp_path / "out", CASES["exact"])
    mask, records = torch.ones(B, S, dtype=torch.bool), case.records()
    parameters = ExpertTargetParameters(expert_scale=4.0, **{kind: 1.0})

    def value() -> torch.Tensor:
        return expert_target_losses(parameters, case.model, records, mask)[kind]

    value().backward()
    trained = {name for name, weight in case.model.named_parameters() if weight.grad is not None}
    assert trained == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)}
    weight = moe_layers(case.model)[0].router.weight
    assert isinstance(weight, torch.Tensor)
    assert weight.grad is not None
    for place in ((0, 3), (2, 7)):
        with torch.no_grad():
            step = 1e-7
            weight[place] += step
            above = float(value())
            weight[place] -= 2 * step
            below = float(value())
            weight[place] += step
        assert float(weight.grad[place]) == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-7)


def test_every_target_with_shared_experts_is_tried() -> None:
    assert set(WITH_SHARED) == {name for name in TARGETS if Feature.SHARED_EXPERTS in load("target", name).holds}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("target", WITH_SHARED)
def test_shared_experts_are_taken_off_in_every_architecture(target: str, pico: Pico, tmp_path: Path) -> None:
    dense = pico(WITH_SHARED[target])
    keys: dict[str, Any] = {"target": target, "method": "random_split", "shared": 4, "experts": 8, "top_k": 2}
    upcycle.convert(str(dense), tmp_path / "out", **keys, verification={"enabled": False})
    layer = moe_layers(load_stock_model(tmp_path / "out", "float32"))[-1]
    ffn = DenseCheckpoint.open(str(dense)).feed_forward(layer.index, "float32")
    taken = torch.cat(
        [e.neurons for e in BlueprintFile(tmp_path / "out" / "blueprint.safetensors").layer(layer.index).shared]
    )
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    act: Any = layer.experts.act_fn
    shared = (act(x @ ffn.gate[taken].T) * (x @ ffn.up[taken].T)) @ ffn.down[:, taken].T
    found = -left_to_routed(layer, x, torch.zeros(7, D))
    assert torch.linalg.norm(found - shared) < 1e-5 * torch.linalg.norm(shared)


def test_the_scale_is_the_records(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not record what its experts were multiplied by"):
        recorded_scale(tmp_path)
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "upcycle.json").write_text('{"scale": 8}')
    assert recorded_scale(tmp_path) == 8.0


def test_what_the_parents_ffns_did_is_recorded(pico: Callable[[str], Path], ids: torch.Tensor) -> None:
    from upcycle.architectures.stock import load_stock_model

    dense = load_stock_model(pico("llama"))
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
