"""Neurons of routed experts are dropped in training, by the formula of dropout, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe_for, run

import upcycle
from upcycle.errors import UsageError
from upcycle.registry import TARGETS
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.routing.expert_dropout import DroppedActivation, drop_inside
from upcycle.trainers.routing.router_control import RouterControl
from upcycle.trainers.routing.stock_routers import moe_layers

Models = Callable[..., Any]
RATE = 0.4


def expected(experts: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, seed: int) -> torch.Tensor:
    """``sum_k w_k down (m * act(gate x) * up x / (1 - p))`` in plain fp64, with the masks that torch draws after a seed."""
    torch.manual_seed(seed)
    out = torch.zeros_like(x)
    for expert in range(len(experts.down_proj)):
        tokens, slots = torch.where((ids == expert).T)[::-1]  # in the order of the stock code: slot by slot
        if not len(tokens):
            continue
        gate, up = (x[tokens] @ experts.gate_up_proj[expert].T).chunk(2, -1)
        mask = torch.nn.functional.dropout(torch.ones_like(gate), RATE) * (1 - RATE)
        assert set(mask.round(decimals=9).unique().tolist()) <= {0.0, 1.0}
        hidden = mask * gate * gate.sigmoid() * up / (1 - RATE)
        out[tokens] += weights[tokens, slots, None] * (hidden @ experts.down_proj[expert].T)
    return out


def test_the_formula_in_fp64(stock: Models) -> None:
    layer = moe_layers(stock("mixtral").double())[0]
    experts = layer.experts.train()
    x = torch.randn(9, experts.down_proj.shape[1], dtype=torch.float64)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, dtype=torch.float64)
    before = experts(x, ids, weights)
    end = drop_inside(experts, RATE)
    want = expected(experts, x, ids, weights, 7)
    torch.manual_seed(7)
    torch.testing.assert_close(experts(x, ids, weights), want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before, want, rtol=0.1)
    experts.eval()
    assert torch.equal(experts(x, ids, weights), before)
    experts.train()
    end()
    assert not any(isinstance(module, DroppedActivation) for module in experts.modules())
    assert torch.equal(experts(x, ids, weights), before)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "upcycle_moe"])
@pytest.mark.one_in(12)
def test_every_target_drops_or_says_why_not(target: str, stock: Models, ids: torch.Tensor) -> None:
    model = stock(target).train()
    before = model(ids).logits
    control = RouterControl(ControlParameters(expert_dropout=RATE))
    try:
        for layer in moe_layers(model):
            control.attach(layer)
    except UsageError as error:
        assert "gating of its own" in error.message
        return
    assert not torch.allclose(model(ids).logits, before, rtol=0.01)
    model.eval()
    quiet = model(ids).logits
    control.detach()
    assert torch.equal(model(ids).logits, quiet)


@pytest.mark.long
def test_packed_experts_of_upcycle_moe_drop_too(pico: Callable[[str], Path], tmp_path: Path) -> None:
    from upcycle.models.load import load_model

    upcycle.convert(
        str(pico("llama")), tmp_path / "moe", experts=4, target="upcycle_moe", verification={"enabled": False}
    )
    model = load_model(tmp_path / "moe", experts="auto", training=True)
    ids = torch.arange(24)[None]
    before = model(ids).logits
    control = RouterControl(ControlParameters(expert_dropout=RATE))
    for layer in moe_layers(model):
        control.attach(layer)
    assert not torch.allclose(model(ids).logits, before, rtol=0.01)
    control.detach()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.long
@pytest.mark.parametrize("frozen", ["router", "experts"])
def test_an_instruction_stage_with_frozen_parts(frozen: str, pico_moe: Callable[..., Path], tmp_path: Path) -> None:
    """Flan-MoE's ablations: what is frozen stays bit for bit, everything else moves; a continued run is the same."""
    from safetensors.torch import load_file

    source = pico_moe("mixtral")
    trains = [part for part in ("router", "experts", "rest") if part != frozen]
    stage = {
        "train": trains,
        "control": {"expert_dropout": 0.2},
        "losses": {"switch_balance": {}, "router_z": {}},
        "steps": 4,
    }
    recipe = recipe_for(source, tmp_path, stage=stage, saving={"every": 2, "export": True})
    result, _ = run(recipe)
    before, after = load_file(source / "model.safetensors"), load_file(Path(str(result.model)) / "model.safetensors")
    names = {"router": ".gate.weight", "experts": ".experts."}
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == (names[frozen] in name), name
    half, _ = run(
        recipe_for(source, tmp_path / "half", stage={**stage, "steps": 4}, saving={"every": 2, "export": True})
    )
    assert half.loss == result.loss
