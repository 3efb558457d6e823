"""Square Hoyer against its formula, and the activations of stock dense models it is computed on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pico_models import COMMON, PICO
from torch.nn.functional import linear

from upcycle.errors import UsageError
from upcycle.registry import FAMILIES, load
from upcycle.trainers.losses.base import auxiliary_losses, make_losses
from upcycle.trainers.routing.neuron_records import ActivationRecord, capture_activations, replace_activations

T, F = 7, 6


def hoyer(row: list[float]) -> float:
    return sum(abs(a) for a in row) ** 2 / (sum(a * a for a in row) + 1e-15)


def value(z: torch.Tensor, **parameters: Any) -> float:
    loss = make_losses({"hoyer": {"coefficient": 1.0, **parameters}})[0]
    return loss([ActivationRecord(0, z, z.relu())]).item()


def test_formula() -> None:
    z = torch.randn(T, F, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 8
    expected = sum(hoyer([max(a, 0.0) for a in row]) for row in z.tolist()) / T
    assert value(z) == pytest.approx(expected, rel=1e-13)
    expected = sum(hoyer([max(a, -3.0) + 3.0 for a in row]) for row in z.tolist()) / T
    assert value(z, of="preactivations", clamp=-3.0) == pytest.approx(expected, rel=1e-13)


def test_hoyer_counts_equal_neurons() -> None:
    z = torch.tensor([[2.0, 2.0, -1.0, -1.0, 2.0, -5.0]], dtype=torch.float64)
    assert value(z) == pytest.approx(3, rel=1e-14)
    assert value(-z.abs()) == 0  # a token without any active neuron


def dense(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model_type, changes = PICO[name]
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{**COMMON, **changes}), dtype=torch.float32
    )


ONE_EACH = {family: name for name, (family, _) in reversed(PICO.items())}


@pytest.mark.parametrize("family", FAMILIES)
def test_records_are_the_gate_branch(family: str, ids: torch.Tensor) -> None:
    model = dense(ONE_EACH[family])
    if family in ("lfm2", "starcoder2", "gpt_neox"):
        with pytest.raises(UsageError, match="activation function in code"):
            capture_activations(model)
        return
    seen: dict[str, torch.Tensor] = {}
    paths = load("family", family).module_paths
    block = getattr(paths.layers_in(model)[1], paths.block)
    block.register_forward_hook(lambda _, inputs, __: seen.update(x=inputs[0].detach()))
    with capture_activations(model) as recorder:
        model(ids)
        records = recorder.take()
    assert [record.layer for record in records] == [0, 1, 2]
    fused = {"phi3": "gate_up_proj", "glm": "gate_up_proj", "granitemoehybrid": "input_linear"}.get(family)
    names = (fused, "gate_proj", "up_proj", "dense_h_to_4h")
    first = next(found for name in names if name and (found := getattr(block, name, None)) is not None)
    rows = first.weight.chunk(2)[0] if fused else first.weight
    torch.testing.assert_close(records[1].before, linear(seen["x"].flatten(0, 1), rows, None if fused else first.bias))
    loss = auxiliary_losses(make_losses({"hoyer": {}}), {"activations": records}, torch.ones_like(ids).bool())["hoyer"]
    assert torch.autograd.grad(loss, model.get_submodule(paths.embedding).weight)[0].abs().max() > 0


def test_relu_can_replace_what_is_there(ids: torch.Tensor) -> None:
    model = dense("llama")
    replace_activations(model)
    with capture_activations(model) as recorder:
        model(ids)
        records = recorder.take()
    assert all(torch.equal(record.after, record.before.relu()) for record in records)
    assert model.config.hidden_act == "relu"
    with pytest.raises(UsageError, match="unknown activation function 'rule'"):
        replace_activations(model, "rule")
